// Bundles and the engine folders built from them, opened suspiciously; see anyflow_deploy/bundle/bundle.py, engine_folder.py.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "manifest.hpp"

namespace af {

namespace fs = std::filesystem;

// How reading of files is watched; both may be empty.
struct Watch {
  bool skip_hashes = false;
  std::function<void(uint64_t done, uint64_t total)> progress;
  std::function<bool()> abort;
};

struct Bundle {
  fs::path path;
  Manifest manifest;
  std::string digest;

  static std::shared_ptr<const Bundle> open(const fs::path& path, const Watch& watch);
  fs::path file(const std::string& name) const;
  static constexpr const char* weights = "weights.safetensors";
};

struct Device {
  std::string kind, name, compute_capability;  // "" where there is none
  bool operator==(const Device&) const = default;
  std::string shown() const;
};

// engine.json, as far as a runtime asks.
struct EngineFolder {
  fs::path path;
  std::string backend, bundle;
  Device device;
  std::map<std::string, std::string> versions, texts;  // of "settings": those that are texts,
  std::map<std::string, bool> flags;                   // and those that are true or false
  std::map<std::string, size_t> profiles;              // how many each graph has, where the backend has them
  Ranges ranges;
  Files files;

  fs::path file(const std::string& name) const;
  bool flag(const std::string& name) const;
};

// Names of the engines inside a bundle, with their backends.
std::vector<std::pair<fs::path, std::string>> built_engines(const Bundle& bundle);
// `engine`: a name in the bundle, a path, or "" where there is only one of the backend.
EngineFolder find_engine(const Bundle& bundle, const std::string& backend, const std::string& engine, const Watch& watch);
// Refuse an engine that was built elsewhere, with both names.
void check_here(const EngineFolder& folder, const Device& device, const std::map<std::string, std::string>& versions);

// Parse only, for the fuzzer: throws Damage.
Manifest parsed_manifest(std::string_view text);
EngineFolder parsed_engine(std::string_view text);

}  // namespace af
