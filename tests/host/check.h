// What the C++ tests share: a check that names what failed and goes on counting, and the exit code.
#pragma once

#include <cstdio>
#include <string>

namespace test {

inline int failures = 0;
inline long checks = 0;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 10) std::printf("FAILED: %s\n", what.c_str());
}

inline int finish(const char* name) {
  std::printf("%s: %ld checks, %d failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace test
