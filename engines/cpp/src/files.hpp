// Files of a folder, compared with what its marker lists; see anyflow_deploy/bundle/atomic_io.py.
#pragma once

#include <string>

#include "bundle.hpp"

namespace af {

// What is being read, for the messages.
struct Kind {
  const char *noun, *marker, *list, *remedy;
};

// A small file, whole. Throws std::system_error.
std::string read_small(const fs::path& path);

// Throws Error naming the file and what is wrong with it. `done` goes up by what was hashed.
void check_file(const fs::path& folder, const std::string& name, const File& file, const Kind& kind, const Watch& watch,
                uint64_t& done, uint64_t total);

// Throws Error(ANYFLOW_ABORTED) if the caller says so.
void check_abort(const std::function<bool()>& abort, const std::string& what);

}  // namespace af
