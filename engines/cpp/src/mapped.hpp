// A file as memory, which the system reads when it is looked at. POSIX.
#pragma once

#include "bundle.hpp"

namespace af {

class Mapped {
 public:
  // Throws Error where it cannot be read.
  explicit Mapped(const fs::path& path);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  // Not NULL, also where the file is empty.
  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const void* data_ = "";
  size_t size_ = 0;
};

}  // namespace af
