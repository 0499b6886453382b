#include "mapped.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.hpp"

namespace af {

Mapped::Mapped(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat about{};
  void* place = MAP_FAILED;
  if (file >= 0 && fstat(file, &about) == 0) {
    size_ = static_cast<size_t>(about.st_size);
    if (size_) place = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  const int fault = errno;
  if (file >= 0) close(file);  // what is mapped stays
  if (place != MAP_FAILED) {
    data_ = place;
  } else if (file < 0 || size_) {
    throw Error(ANYFLOW_BUNDLE, path.string() + " cannot be read: " + std::strerror(fault) + ".");
  }
}

Mapped::~Mapped() {
  if (size_) munmap(const_cast<void*>(data_), size_);
}

}  // namespace af
