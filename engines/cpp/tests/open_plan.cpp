// Opens plans with the backend's own code, whether there is a GPU or not, so that a test sees what the real library says where
// there is none: open_plan PLAN…. One line for each: the code and the text of the error, or "opened".
#include <iostream>

#include "tensorrt_plan.hpp"

int main(int count, char** words) {
  std::cout << af::trt::library.backend << " " << af::trt::version() << std::endl;
  for (int i = 1; i < count; ++i) {
    try {
      const af::trt::Plan plan(words[i], "transition", {}, {});
      std::cout << "opened" << std::endl;
    } catch (const af::Error& error) {
      std::cout << error.code << " " << error.what() << std::endl;
    }
  }
}
