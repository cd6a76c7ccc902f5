// Threads that fill slots from storage: what was asked for in its order, and when there is nothing to do what may be
// asked for soon.
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

// A record and where its bytes go.
struct Read {
  int record = -1, slot = -1;
  size_t offset = 0, bytes = 0;
};

// Whose memory is filled. Called from any reader, with no lock of Readers held.
class ReadClient {
 public:
  virtual std::optional<Read> read_ahead_now(int record) = 0;    // none: there is no room, or it is there
  virtual void fill(int reader, const Read& read) = 0;           // may throw
  virtual bool ended(const Read& read, std::exception_ptr) = 0;  // true: read it once more

 protected:
  ~ReadClient() = default;
};

class Readers {
 public:
  Readers(int count, ReadClient& client);  // throws SystemError when the system refuses that many threads
  ~Readers();                              // reads that have begun end first
  Readers(const Readers&) = delete;

  void ask(const Read& read);
  // Records that may be asked for soon, most likely first, instead of those named before.
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
