// Reader threads; see readers.h.
#include "readers.h"

#include <utility>

#include "threads.h"

namespace edge_moe {

Readers::Readers(int count, ReadClient& client) : client_(client) {
  start_threads(threads_, count, [this](int reader) { work(reader); }, [this] { stop(); });
}

Readers::~Readers() { stop(); }

void Readers::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  asked_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Readers::ask(const Read& read) {
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(read);
  }
  asked_.notify_one();
}

void Readers::ask_ahead(std::span<const int32_t> records) {
  {
    std::lock_guard lock(mutex_);
    ahead_.assign(records.rbegin(), records.rend());
  }
  for (size_t i = 0; i < records.size(); ++i) asked_.notify_one();
}

void Readers::work(int reader) {
  std::unique_lock lock(mutex_);
  while (true) {
    asked_.wait(lock, [this] { return stop_ || !queue_.empty() || !ahead_.empty(); });
    if (stop_) return;
    std::optional<Read> read;
    int ahead = -1;
    if (!queue_.empty())
      read = queue_.front(), queue_.pop_front();
    else
      ahead = ahead_.back(), ahead_.pop_back();
    lock.unlock();
    if (!read) read = client_.read_ahead_now(ahead);
    if (read) {
      std::exception_ptr error;
      try {
        client_.fill(reader, *read);
      } catch (...) {
        error = std::current_exception();
      }
      // Moved: the thread that waits for the read frees the error, maybe before this call returns.
      if (client_.ended(*read, std::move(error))) ask(*read);
    }
    lock.lock();
  }
}

}  // namespace edge_moe
