#include "safetensors.hpp"

#include <cstring>
#include <limits>

#include "error.hpp"

namespace af {
namespace {

constexpr uint64_t longest_header = 100'000'000;  // the format's own limit

const std::map<std::string, uint64_t> type_bytes = {{"F64", 8}, {"I64", 8},     {"U64", 8},     {"F32", 4}, {"I32", 4},
                                                    {"U32", 4}, {"F16", 2},     {"BF16", 2},    {"I16", 2}, {"U16", 2},
                                                    {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1},  {"BOOL", 1}};

uint64_t size_of(const Value& place, const Stored& tensor) {
  const auto found = type_bytes.find(tensor.type);
  if (found == type_bytes.end()) throw Damage(place.place(), "type " + tensor.type + " is not known");
  uint64_t bytes = found->second;
  for (const int64_t axis : tensor.shape) {
    if (axis < 0) throw Damage(place.place(), "a shape with a negative number");
    const auto length = static_cast<uint64_t>(axis);
    if (length && bytes > std::numeric_limits<uint64_t>::max() / length) throw Damage(place.place(), "a shape too large");
    bytes *= length;
  }
  return bytes;
}

uint64_t little_endian(const unsigned char* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

}  // namespace

std::map<std::string, Stored> parsed_index(std::string_view header, uint64_t size) {
  std::map<std::string, Stored> index;
  const uint64_t begin = 8 + header.size();
  for (const auto& [name, item] : Value::parsed(header).members()) {
    if (name == "__metadata__") continue;
    Record record(item);
    Stored tensor{record.text("dtype"), {}, 0, 0};
    for (const Value& axis : record.required("shape").items()) tensor.shape.push_back(axis.integer());
    const auto offsets = record.required("data_offsets").items();
    record.done();
    if (offsets.size() != 2) throw Damage(item.place(), "data_offsets are two numbers");
    const int64_t from = offsets[0].integer(), to = offsets[1].integer();
    if (from < 0 || to < from || size < begin || static_cast<uint64_t>(to) > size - begin)
      throw Damage(item.place(), "it lies outside the file");
    tensor.offset = begin + static_cast<uint64_t>(from), tensor.bytes = static_cast<uint64_t>(to - from);
    if (size_of(item, tensor) != tensor.bytes) throw Damage(item.place(), "its size is not that of its shape");
    index.emplace(name, std::move(tensor));
  }
  return index;
}

Safetensors::Safetensors(const fs::path& path) : path_(path), file_(path, std::ios::binary) {
  const auto refuse = [&](const std::string& reason) {
    throw Error(ANYFLOW_BUNDLE, path.string() + " is no .safetensors file: " + reason + ".");
  };
  std::error_code failed;
  const uint64_t size = fs::file_size(path, failed);
  if (!file_ || failed) refuse("it cannot be read");
  unsigned char length[8];
  if (!file_.read(reinterpret_cast<char*>(length), sizeof length)) refuse("it is shorter than 8 bytes");
  const uint64_t count = little_endian(length);
  if (count > longest_header || count > size - 8) refuse("its index is longer than the file");
  std::string header(static_cast<size_t>(count), '\0');
  if (!file_.read(header.data(), static_cast<std::streamsize>(count))) refuse("its index cannot be read");
  try {
    index_ = parsed_index(header, size);
  } catch (const Damage& damage) {
    refuse(damage.place + ": " + damage.what());
  }
}

const Stored* Safetensors::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &found->second;
}

void Safetensors::read(const Stored& tensor, void* into) {
  file_.clear();
  file_.seekg(static_cast<std::streamoff>(tensor.offset));
  if (tensor.bytes && !file_.read(static_cast<char*>(into), static_cast<std::streamsize>(tensor.bytes))) {
    throw Error(ANYFLOW_BUNDLE, path_.string() + " cannot be read to its end.");
  }
}

void save_tensor(const fs::path& path, const std::string& name, const float* data, const std::vector<int64_t>& shape) {
  uint64_t bytes = sizeof(float);
  for (const int64_t axis : shape) bytes *= static_cast<uint64_t>(axis);
  std::string header = json_object({{name, "{\"dtype\":\"F32\",\"shape\":" + list(std::span<const int64_t>(shape)) +
                                               ",\"data_offsets\":[0," + std::to_string(bytes) + "]}"}});
  header.append((8 - header.size() % 8) % 8, ' ');
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> (8 * i));
  const fs::path partial = path.parent_path() / ("." + path.filename().string() + ".partial");
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(length), sizeof length);
  file << header;
  file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  file.close();
  std::error_code failed;
  if (file) fs::rename(partial, path, failed);
  if (!file || failed) {
    fs::remove(partial, failed);
    throw Error(ANYFLOW_INVALID, path.string() + " cannot be written. Choose a folder that is there, with room in it.");
  }
}

}  // namespace af
