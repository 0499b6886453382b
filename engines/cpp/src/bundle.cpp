#include "bundle.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "error.hpp"
#include "files.hpp"
#include "sha256.hpp"

namespace af {
namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr const char* engine_name = "engine.json";
constexpr const char* build_again = "Build it again with anyflow-build.";

const Kind bundle_kind{"bundle", manifest_name, "manifest", "Copy the bundle again, or export again."};
const Kind engine_kind{"engine", engine_name, "engine.json", build_again};

// A whole number as it is, a text in quotes, anything else in a word: what schema a file says it has.
std::string schema_shown(const Value& schema) {
  try {
    return schema.is_text() ? in_quotes(schema.text()) : std::to_string(schema.integer());
  } catch (const Damage&) {
    return "no whole number";
  }
}

bool is_newer(const Value& schema) {
  try {
    return schema.integer() > Manifest::schema;
  } catch (const Damage&) {
    return false;
  }
}

bool is_schema(const Value& schema) {
  try {
    return schema.integer() == Manifest::schema;
  } catch (const Damage&) {
    return false;
  }
}

std::map<std::string, std::string> read_texts(const Value& value) {
  std::map<std::string, std::string> texts;
  for (const auto& [key, item] : value.members()) texts[key] = item.text();
  return texts;
}

// The document with a "schema" in it, and that schema.
std::pair<Value, Value> with_schema(std::string_view text) {
  const Value root = Value::parsed(text);
  const auto schema = root.find("schema");
  if (!schema) throw Damage("", "no JSON object with a 'schema'");
  return {root, *schema};
}

[[noreturn]] void bundle_error(const std::string& text) { throw Error(ANYFLOW_BUNDLE, text); }

void check_files(const fs::path& folder, const Files& files, const Kind& kind, const Watch& watch) {
  uint64_t total = 0, done = 0;
  for (const auto& [name, file] : files) total += static_cast<uint64_t>(std::max<int64_t>(file.bytes, 0));
  for (const auto& [name, file] : files) check_file(folder, name, file, kind, watch, done, total);
}

std::string read_marker(const fs::path& folder, const char* name, const std::string& remedy, const char* noun) {
  try {
    return read_small(folder / name);
  } catch (const std::system_error& error) {
    bundle_error(folder.string() + " is not " + noun + ": " + name + " cannot be read (" + error.code().message() + "). " +
                 remedy);
  }
}

EngineFolder load_engine_folder(const fs::path& path, const Watch& watch) {
  const std::string text = read_marker(path, engine_name, build_again, "an engine");
  const std::string where = (path / engine_name).string();
  EngineFolder folder;
  try {
    const auto [root, schema] = with_schema(text);
    if (!is_schema(schema)) {
      bundle_error(path.string() + " has engine schema " + schema_shown(schema) + "; this version reads 1. " + build_again);
    }
    folder = parsed_engine(text);
  } catch (const Damage& damage) {
    bundle_error(where + " is damaged" + (damage.place.empty() ? "" : " at " + in_quotes(damage.place)) + ": " + damage.what() +
                 ". " + build_again);
  }
  folder.path = path;
  check_files(path, folder.files, engine_kind, watch);
  return folder;
}

}  // namespace

Manifest parsed_manifest(std::string_view text) { return Manifest::read(with_schema(text).first); }

EngineFolder parsed_engine(std::string_view text) {
  Record record(with_schema(text).first);
  EngineFolder folder;
  record.integer("schema");
  folder.backend = record.text("backend");
  folder.bundle = record.text("bundle");
  Record device(record.required("device"));
  folder.device = {device.word("kind", {"cpu", "cuda"}), device.text("name"), ""};
  if (const auto capability = device.optional("compute_capability", true)) folder.device.compute_capability = capability->text();
  device.done();
  folder.versions = read_texts(record.required("versions"));
  for (const auto& [key, item] : record.required("settings").members()) {
    if (item.is_text()) folder.texts[key] = item.text();
    if (item.is_flag()) folder.flags[key] = item.boolean();
  }
  folder.ranges = Ranges::read(record.required("ranges"));
  if (const auto profiles = record.optional("profiles")) {
    for (const auto& [graph, item] : profiles->members()) folder.profiles[graph] = item.members().size();
  }
  if (const auto achieved = record.optional("achieved")) achieved->members();
  record.number("seconds");
  if (const auto files = record.optional("files")) folder.files = read_files(*files);
  record.done();
  return folder;
}

std::shared_ptr<const Bundle> Bundle::open(const fs::path& path, const Watch& watch) {
  const std::string text = read_marker(path, manifest_name, "Make one with anyflow-export.", "a bundle");
  const std::string where = (path / manifest_name).string();
  auto bundle = std::make_shared<Bundle>();
  try {
    const auto schema = with_schema(text).second;
    if (!is_schema(schema)) {
      bundle_error(path.string() + " has manifest schema " + schema_shown(schema) + "; this version reads 1. " +
                   (is_newer(schema) ? "Update anyflow_deploy." : "Export again."));
    }
    bundle->manifest = parsed_manifest(text);
  } catch (const Damage& damage) {
    if (damage.place.empty()) bundle_error(where + " is not a manifest: no JSON object with a 'schema'. Export again.");
    bundle_error(where + " is damaged at " + in_quotes(damage.place) + ": " + damage.what() + ". Export again.");
  }
  bundle->path = path, bundle->digest = sha256_of(text);
  check_files(path, bundle->manifest.files, bundle_kind, watch);
  for (const auto& [name, graph] : bundle->manifest.graphs) bundle->file(graph.file);
  return bundle;
}

fs::path Bundle::file(const std::string& name) const {
  if (!manifest.files.contains(name)) bundle_error(path.string() + " has no file " + in_quotes(name) + " in its manifest.");
  return path / name;
}

fs::path EngineFolder::file(const std::string& name) const {
  if (!files.contains(name)) bundle_error(path.string() + " has no file " + in_quotes(name) + ". " + build_again);
  return path / name;
}

bool EngineFolder::flag(const std::string& name) const {
  const auto found = flags.find(name);
  return found != flags.end() && found->second;
}

std::string Device::shown() const {
  return compute_capability.empty() ? name : name + " (compute capability " + compute_capability + ")";
}

std::vector<std::pair<fs::path, std::string>> built_engines(const Bundle& bundle) {
  std::vector<std::pair<fs::path, std::string>> found;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(bundle.path / "engines", none)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".") || !fs::is_regular_file(entry.path() / engine_name, none)) continue;
    std::string backend;
    try {
      const auto value = Value::parsed(read_small(entry.path() / engine_name)).find("backend");
      if (value && value->is_text()) backend = value->text();
    } catch (const std::exception&) {  // it is named if it is asked for
    }
    found.emplace_back(entry.path(), backend);
  }
  std::sort(found.begin(), found.end());
  return found;
}

EngineFolder find_engine(const Bundle& bundle, const std::string& backend, const std::string& engine, const Watch& watch) {
  const std::string build = "anyflow-build " + bundle.path.string() + " --backend " + backend;
  const auto found = built_engines(bundle);
  std::vector<fs::path> ours;
  std::string names, our_names;
  for (const auto& [path, kind] : found) {
    names += (names.empty() ? "" : ", ") + path.filename().string();
    if (kind == backend) our_names += (ours.empty() ? "" : ", ") + path.filename().string(), ours.push_back(path);
  }
  fs::path path;
  if (engine.empty()) {
    if (ours.empty())
      throw Error(ANYFLOW_BACKEND,
                  bundle.path.string() + " has no " + backend + " engine yet. Make one on this machine: " + build);
    if (ours.size() > 1) {
      throw Error(ANYFLOW_BACKEND,
                  bundle.path.string() + " has several " + backend + " engines (" + our_names + "): choose one by name.");
    }
    path = ours[0];
  } else {
    std::error_code none;
    path = bundle.path / "engines" / engine;
    if (!fs::is_regular_file(path / engine_name, none)) path = engine;
    if (!fs::is_regular_file(path / engine_name, none)) {
      throw Error(ANYFLOW_BACKEND, "there is no engine " + in_quotes(engine) + "; " + bundle.path.string() + " has " +
                                       (names.empty() ? "none" : names) + ". Make one: " + build);
    }
  }
  EngineFolder folder = load_engine_folder(path, watch);
  if (folder.backend != backend) {
    throw Error(ANYFLOW_BACKEND,
                path.string() + " is an engine of backend " + folder.backend + ", and " + backend + " was asked for.");
  }
  if (folder.bundle != bundle.digest) {
    throw Error(ANYFLOW_BACKEND, path.string() + " was built from bundle " + folder.bundle.substr(0, 12) + ", and " +
                                     bundle.path.string() + " is " + bundle.digest.substr(0, 12) + ". Build it again: " + build +
                                     " --overwrite");
  }
  return folder;
}

void check_here(const EngineFolder& folder, const Device& device, const std::map<std::string, std::string>& versions) {
  const std::string remedy = "Build it on this machine: anyflow-build … --backend " + folder.backend;
  if (folder.device != device) {
    throw Error(ANYFLOW_BACKEND, folder.path.string() + " was built for " + folder.device.shown() + ", and this is " +
                                     device.shown() + ". " + remedy);
  }
  for (const auto& [name, version] : versions) {
    const auto built = folder.versions.find(name);
    const std::string was = built == folder.versions.end() ? "unknown" : built->second;
    if (was != version) {
      throw Error(ANYFLOW_BACKEND, folder.path.string() + " was built with " + name + " " + was + ", and here is " + name + " " +
                                       version + ". " + remedy);
    }
  }
}

}  // namespace af
