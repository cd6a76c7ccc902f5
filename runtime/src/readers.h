// Threads that fill slots from storage: requested reads in order and, when there are none, records that may be needed
// soon.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

namespace edge_moe {

// A record and the place of its bytes.
struct Read {
  int record = -1, slot = -1;
  size_t offset = 0, bytes = 0;
};

// The owner of the memory that is filled. Called from any reader, without a lock of Readers held.
class ReadClient {
 public:
  virtual std::optional<Read> read_ahead_now(int record) = 0;    // none: no room, or already in a slot
  virtual void fill(int reader, const Read& read) = 0;           // may throw
  virtual bool ended(const Read& read, std::exception_ptr) = 0;  // true: retry the read

 protected:
  ~ReadClient() = default;
};

class Readers {
 public:
  Readers(int count, ReadClient& client);  // throws SystemError if the system refuses a thread
  ~Readers();                              // waits for reads that have begun
  Readers(const Readers&) = delete;

  void ask(const Read& read);
  // Replace the list of records that may be needed soon, most likely first.
  void ask_ahead(std::span<const int32_t> records);

 private:
  void work(int reader);
  void stop();

  ReadClient& client_;
  std::mutex mutex_;
  std::condition_variable asked_;
  std::deque<Read> queue_;
  std::vector<int32_t> ahead_;  // the next one last
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace edge_moe
