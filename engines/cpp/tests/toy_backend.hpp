// A backend for tests, with arithmetic that numpy repeats bit for bit (tests/fakes/toy_backend.py), a clock of its own and a log of what
// the cache was told.
#pragma once

#include <string>
#include <vector>

#include "engine.hpp"

namespace toy {

struct State {
  double now = 0;                  // seconds
  std::vector<double> costs;       // of one transition after the other, again and again
  std::vector<std::string> calls;  // of the cache
  size_t transitions = 0;
};

State& state();
// Adds the backend "toy".
extern "C" void toy_backend_install(void);

}  // namespace toy
