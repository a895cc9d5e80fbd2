// A zeroed array on huge pages where the system has them: random reads then miss the TLB less often.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace hammer {

template <class T>
class Table {
 public:
  Table() = default;

  explicit Table(size_t size) : size_(size), mapped_(size * sizeof(T) + kHugePage) {
    // One huge page to spare, so that the array can begin on one; pages that nobody touches cost nothing.
    start_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(start_);
    data_ = reinterpret_cast<T*>((address + kHugePage - 1) / kHugePage * kHugePage);
    // A wish: where it is not granted all works, slower. A small array would waste most of a huge page.
#ifdef MADV_HUGEPAGE  // Linux; elsewhere the system chooses by itself
    if (size * sizeof(T) >= kHugePage) madvise(data_, size * sizeof(T), MADV_HUGEPAGE);
#endif
  }

  Table(Table&& other) noexcept { swap(other); }
  Table& operator=(Table&& other) noexcept { return swap(other), *this; }
  ~Table() {
    if (data_ != nullptr) munmap(start_, mapped_);
  }

  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  void swap(Table& other) {
    std::swap(start_, other.start_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
  }

  void* start_ = nullptr;
  T* data_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

}  // namespace hammer
