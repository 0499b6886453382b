// A plan of the stand-in's: lines of text that say which tensors there are, in which profiles, and which of four graphs is meant.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace standin {

using Shape = std::vector<int64_t>;

struct PlanTensor {
  std::string name, type;
  Shape shape;  // -1: of any length
  bool input = true, host = false;
  size_t element() const { return type == "float32" ? 4 : type == "int64" ? 8 : 2; }
};

struct PlanFile {
  std::string version, capability, graph;
  int64_t patch = 1, weights = 0, fails = 0;
  bool version_compatible = false, weight_streaming = false;
  std::vector<PlanTensor> tensors;
  std::vector<std::map<std::string, std::vector<Shape>>> profiles;  // smallest, best and largest of each input

  // Throws std::runtime_error where it is no plan, or was cut.
  static PlanFile parsed(const std::string& text);
  const PlanTensor* find(const std::string& name) const;
};

using Shapes = std::map<std::string, Shape>;
using Bytes = std::map<std::string, const uint8_t*>;

size_t elements(const Shape& shape);
// Shapes of all tensors, from the inputs'.
Shapes all_shapes(const PlanFile& plan, Shapes inputs);
// Arithmetic that numpy repeats to the last bit (tests/fakes/cpp_tensorrt.py): every byte of every input changes every output.
void compute(const PlanFile& plan, const Shapes& shapes, const Bytes& inputs, const std::map<std::string, uint8_t*>& outputs);

}  // namespace standin
