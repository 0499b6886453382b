// What is behind the opaque handles. Each keeps what it needs, so they may be closed in any order.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sampler.hpp"

struct anyflow_error {
  anyflow_code code;
  std::string text;
};

struct anyflow_bundle {
  std::shared_ptr<const af::Bundle> bundle;
};

struct anyflow_schedule {
  af::Schedule schedule;
};

struct anyflow_pace {
  std::shared_ptr<af::Pace> pace;
};

struct anyflow_engine {
  std::shared_ptr<af::Engine> engine;
};

struct anyflow_run {
  std::shared_ptr<af::Engine> engine;
  std::unique_ptr<af::Run> run;
};

struct anyflow_stream {
  af::Video video;
  std::shared_ptr<af::Engine> engine;
};

struct anyflow_tensor {
  std::vector<int64_t> shape;
  std::vector<float> data;
};
