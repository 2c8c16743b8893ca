// What the microbenchmarks share: options, the table and its JSON, device memory, and the clock that really ran.
//
// A GPU's clock moves with its load, so limits are not read from a data sheet: a kernel stamps its start and end with
// the multiprocessor's cycle counter and with the global timer, and a limit is (units a cycle) x (cycles a second that
// were counted) x (multiprocessors).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda/ptx>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace micro {

// Of one multiprocessor and cycle (Hopper; NVIDIA H100 white paper, CUDA programming guide's throughput table).
constexpr double kTensorFlops = 4096;  // 16-bit operands, float32 sums: m64nNk16 takes N/2 cycles
constexpr double kExp2 = 16;           // MUFU
constexpr double kFma = 128;           // FFMA, and instructions of a thread of any kind: 4 schedulers x 32 threads
constexpr double kLoadBytes = 64;      // from L2

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("wrong result: " + what);
}

inline double median(std::vector<double> values) {
  auto middle = values.begin() + values.size() / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// ------------------------------------------------------------------------------------------------ memory and launches

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size;

  explicit DeviceArray(size_t size) : size(size) {
    check(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc");
    poison();
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    check(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copying to the device");
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }

  // NaN in every floating-point type, so that what nobody writes shows.
  void poison() const { check(cudaMemset(data, 0xff, size * sizeof(T)), "cudaMemset"); }
  void zero() const { check(cudaMemset(data, 0, size * sizeof(T)), "cudaMemset"); }

  std::vector<T> host() const {
    std::vector<T> copy(size);
    check(cudaMemcpy(copy.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "running the kernel");
    return copy;
  }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, Arguments&&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "asking for shared memory");
  kernel<<<blocks, threads, shared_bytes>>>(std::forward<Arguments>(arguments)...);
  check(cudaGetLastError(), "launching a kernel");
}

template <int kNanoseconds>
__global__ void spin() {
  const auto start = cuda::ptx::get_sreg_globaltimer();
  while (cuda::ptx::get_sreg_globaltimer() - start < kNanoseconds) {
  }
}

// Keeps the GPU from starting what is queued next before all of it is queued: no launch gap is measured.
inline void hold() {
  spin<50'000><<<1, 1>>>();
  check(cudaGetLastError(), "launching a kernel");
}

// Time of what `enqueue` puts on the default stream, by two events.
class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  Timer(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }

  template <class Enqueue>
  double seconds(Enqueue&& enqueue) {
    check(cudaEventRecord(start_), "cudaEventRecord");
    enqueue();
    check(cudaEventRecord(stop_), "cudaEventRecord");
    check(cudaEventSynchronize(stop_), "running the kernel");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_), "cudaEventElapsedTime");
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t start_, stop_;
};

// ------------------------------------------------------------------------------------------------------------- clock

// A moment on one multiprocessor, or the time between two.
struct Stamp {
  long long cycles;
  long long nanoseconds;

  static __device__ __forceinline__ Stamp now() {
    return {clock64(), static_cast<long long>(cuda::ptx::get_sreg_globaltimer())};
  }
  __device__ __forceinline__ Stamp since(const Stamp& start) const {
    return {cycles - start.cycles, nanoseconds - start.nanoseconds};
  }
};

// Cycles a second, from what every block measured of itself.
inline double clock_of(const std::vector<Stamp>& intervals) {
  std::vector<double> clocks;
  for (const Stamp& interval : intervals) {
    if (interval.nanoseconds > 0) clocks.push_back(1e9 * interval.cycles / interval.nanoseconds);
  }
  const double clock = clocks.empty() ? NAN : median(clocks);
  require(clock > 1e8 && clock < 1e10, "a clock of " + std::to_string(clock) + " Hz");
  return clock;
}

// -------------------------------------------------------------------------------------------------------------- data

__host__ __device__ inline uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

// Normally distributed, or zeros, which draw less power and so flatter.
template <class T>
std::vector<T> values(size_t count, bool random, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = T(random ? normal(generator) : 0.f);
  return values;
}

template <class T>
constexpr const char* type_name() {
  return std::is_same_v<T, __half> ? "fp16" : "bf16";
}

// ------------------------------------------------------------------------------------------- options, table and JSON

using Value = std::variant<std::string, double>;  // NaN: not measured

struct Column {
  const char* key;  // in the JSON file
  const char* title;
  int decimals = -1;  // -1: text
};

struct Description {
  const char* name;
  const char* text;        // what --help says of it
  double seconds = 0;      // default of --seconds; 0: there is no such option
  const char* cells = "";  // what other arguments mean; "": there are none
  std::vector<Column> columns;
};

class Session {
 public:
  bool dry_run = false;  // without a GPU: the rows, nothing measured
  double seconds;
  std::vector<std::string> cells;
  int multiprocessors = 0;

  Session(const Description& description, int argc, char** argv)
      : seconds(description.seconds), description_(description) {
    for (int i = 1; i < argc; ++i) {
      const std::string option = argv[i];
      const auto argument = [&]() -> std::string {
        if (i + 1 == argc) throw std::invalid_argument(option + " needs a value");
        return argv[++i];
      };
      if (option == "--json") {
        json_path_ = argument();
      } else if (option == "--dry-run") {
        dry_run = true;
      } else if (option == "--seconds" && description.seconds > 0) {
        const std::string text = argument();
        char* end;
        seconds = std::strtod(text.c_str(), &end);
        if (*end || !(seconds > 0 && seconds <= 60)) {
          throw std::invalid_argument("--seconds must be above 0 and at most 60, not " + text);
        }
      } else if (option[0] != '-' && *description.cells) {
        cells.push_back(option);
      } else {
        throw std::invalid_argument("unknown argument " + option);
      }
    }
  }

  // Before the first launch.
  void open_device() {
    int devices = 0, major = 0, minor = 0, runtime = 0;
    if (dry_run) return;
    check(cudaGetDeviceCount(&devices), "looking for a GPU");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "asking the device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "asking the device");
    if (major != 9 || minor != 0) throw std::runtime_error("the GPU is not a Hopper (compute capability 9.0)");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "asking the device");
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "asking the device");
    check(cudaRuntimeGetVersion(&runtime), "asking for CUDA's version");
    gpu_ = properties.name;
    cuda_ = std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);
    std::printf("%s, %d multiprocessors, CUDA %s\n", gpu_.c_str(), multiprocessors, cuda_.c_str());
  }

  void add(const std::vector<Value>& row) {
    if (rows_.empty()) {
      for (const Column& column : description_.columns) print(column, column.title);
      std::printf("\n");
    }
    for (size_t i = 0; i < row.size(); ++i) print(description_.columns[i], text(row[i], description_.columns[i]));
    std::printf("\n");
    std::fflush(stdout);
    rows_.push_back(row);
  }

  void write_json() const {
    if (json_path_.empty()) return;
    std::FILE* file = std::fopen(json_path_.c_str(), "w");
    if (!file) throw std::runtime_error("cannot write " + json_path_);
    std::fprintf(file, "{\n \"benchmark\": \"%s\",\n \"environment\": {", description_.name);
    if (!dry_run) {
      std::fprintf(file, "\"gpu\": \"%s\", \"multiprocessors\": %d, \"cuda\": \"%s\"", gpu_.c_str(), multiprocessors,
                   cuda_.c_str());
    }
    std::fprintf(file, "},\n \"rows\": [");
    for (size_t row = 0; row < rows_.size(); ++row) {
      std::fprintf(file, row ? ",\n  {" : "\n  {");
      for (size_t i = 0; i < rows_[row].size(); ++i) {
        const Column& column = description_.columns[i];
        std::string value = text(rows_[row][i], column);
        if (column.decimals < 0) value = '"' + value + '"';
        if (value == "-") value = "null";
        std::fprintf(file, "%s\"%s\": %s", i ? ", " : "", column.key, value.c_str());
      }
      std::fprintf(file, "}");
    }
    std::fprintf(file, "\n ]\n}\n");
    if (std::fclose(file) != 0) throw std::runtime_error("cannot write " + json_path_);
  }

 private:
  static std::string text(const Value& value, const Column& column) {
    if (const auto* string = std::get_if<std::string>(&value)) return *string;
    const double number = std::get<double>(value);
    if (!std::isfinite(number)) return "-";
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, "%.*f", column.decimals, number);
    return buffer;
  }

  static void print(const Column& column, const std::string& text) {
    const int title = static_cast<int>(std::string(column.title).size());
    if (column.decimals < 0) {
      std::printf("  %-*s", std::max(14, title), text.c_str());
    } else {
      std::printf("  %*s", std::max(6, title), text.c_str());
    }
  }

  Description description_;
  std::string json_path_, gpu_, cuda_;
  std::vector<std::vector<Value>> rows_;
};

// main(): 0 measured, 1 something failed or came out wrong, 2 arguments not understood.
inline int run(const Description& description, int argc, char** argv, void (*measure)(Session&)) {
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) != "--help") continue;
    std::printf("%s\n\nUsage: micro_%s [--json FILE] [--dry-run]", description.text, description.name);
    if (description.seconds > 0) std::printf(" [--seconds S]");
    std::printf("%s%s\n\n", *description.cells ? " " : "", description.cells);
    std::printf("  --json FILE   also writes the table there\n  --dry-run     the table's rows, without a GPU\n");
    if (description.seconds > 0) std::printf("  --seconds S   for each row, %.2f by default\n", description.seconds);
    return 0;
  }
  try {
    Session session(description, argc, argv);
    session.open_device();
    measure(session);
    session.write_json();
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "micro_%s: %s (see --help)\n", description.name, error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "micro_%s: %s\n", description.name, error.what());
    return 1;
  }
}

}  // namespace micro
