#include "files.hpp"

#include <cerrno>
#include <fstream>
#include <system_error>
#include <vector>

#include "error.hpp"
#include "sha256.hpp"

namespace af {
namespace {

constexpr size_t block_bytes = 1 << 20;
constexpr uintmax_t small_bytes = 256 << 20;

[[noreturn]] void refuse_file(const std::string& text) { throw Error(ANYFLOW_BUNDLE, text); }

bool leaves(const fs::path& folder, const std::string& name) {
  const fs::path relative(name);
  if (relative.is_absolute() || name.find('\\') != std::string::npos || name.find('\0') != std::string::npos) return true;
  for (const fs::path& part : relative) {
    if (part == "..") return true;
  }
  std::error_code failed;
  const fs::path root = fs::weakly_canonical(folder, failed), path = fs::weakly_canonical(folder / relative, failed);
  if (failed) return true;  // a loop of links, a name too long
  const auto [end, at] = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
  return end != root.end();
}

std::string hashed(const fs::path& path, const Watch& watch, uint64_t& done, uint64_t total) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse_file(path.string() + " cannot be read (" + std::generic_category().message(errno) + ").");
  Sha256 hash;
  std::vector<char> block(block_bytes);
  while (file) {
    check_abort(watch.abort, "checking " + path.string());
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    const auto count = static_cast<size_t>(file.gcount());
    hash.update({reinterpret_cast<const unsigned char*>(block.data()), count});
    done += count;
    if (watch.progress) watch.progress(done, total);
  }
  if (file.bad()) refuse_file(path.string() + " cannot be read to its end.");
  return hash.finish();
}

}  // namespace

void check_abort(const std::function<bool()>& abort, const std::string& what) {
  if (abort && abort()) throw Error(ANYFLOW_ABORTED, what + " was aborted by the caller.");
}

std::string read_small(const fs::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::error_code none;
  if (!file || fs::is_directory(path, none)) throw std::system_error(errno ? errno : EISDIR, std::generic_category());
  if (fs::file_size(path, none) > small_bytes && !none) throw std::system_error(EFBIG, std::generic_category());
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) throw std::system_error(EIO, std::generic_category());
  return text;
}

void check_file(const fs::path& folder, const std::string& name, const File& file, const Kind& kind, const Watch& watch,
                uint64_t& done, uint64_t total) {
  if (leaves(folder, name)) {
    std::error_code none;
    const bool link = name.find('\0') == std::string::npos && fs::is_symlink(folder / name, none);
    refuse_file((folder / kind.marker).string() + " names " + in_quotes(name) + ", which leaves the " + kind.noun +
                "'s folder. Do not use this " + kind.noun + "." +
                (link ? " If the link is a hub cache's, copy the bundle with cp -rL." : ""));
  }
  const fs::path path = folder / name;
  std::error_code none;
  if (!fs::is_regular_file(path, none)) {
    refuse_file(folder.string() + " lacks " + in_quotes(name) + ", which its " + kind.list + " lists. " + kind.remedy);
  }
  const auto size = static_cast<int64_t>(fs::file_size(path));
  if (size != file.bytes) {
    refuse_file(path.string() + " has " + std::to_string(size) + " bytes; the " + kind.list + " says " +
                std::to_string(file.bytes) + ". " + kind.remedy);
  }
  if (watch.skip_hashes) return;
  const std::string found = hashed(path, watch, done, total);
  if (found != file.sha256) {
    refuse_file(path.string() + " was changed: its SHA-256 is " + found + ", the " + kind.list + " says " + file.sha256 + ". " +
                kind.remedy);
  }
}

}  // namespace af
