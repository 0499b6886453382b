// Opens engines, whether there is a GPU or not, so that a test sees what the real library says where there is none. One line for
// each: the code and the text of the error, or "opened".
//
//   open_engine plan FILE…           plans, by the backend's own code
//   open_engine bundle FOLDER NAME…  a bundle's engine of each backend, as an application does it; "": of any
#include <iostream>

#include "anyflow/anyflow.hpp"
#include "tensorrt_plan.hpp"

int main(int count, char** words) {
  const std::string kind = count > 1 ? words[1] : "";
  const bool plans = kind == "plan";
  if ((!plans && kind != "bundle") || count < 3) return 2;
  std::cout << af::trt::library.backend << " " << af::trt::version() << std::endl;
  for (int i = plans ? 2 : 3; i < count; ++i) {
    try {
      if (plans) {
        const af::trt::Plan plan(words[i], "transition", {}, {});
      } else {
        anyflow::EngineOptions options;
        options.backend = words[i];
        const anyflow::Engine engine(anyflow::Bundle(words[2]), options);
      }
      std::cout << "opened" << std::endl;
    } catch (const af::Error& error) {
      std::cout << error.code << " " << error.what() << std::endl;
    } catch (const anyflow::Error& error) {
      std::cout << error.code() << " " << error.what() << std::endl;
    }
  }
}
