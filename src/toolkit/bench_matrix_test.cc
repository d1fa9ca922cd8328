#include "toolkit/bench_matrix.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <regex>

#include "core/file.h"
#include "toolkit/bench_matrix_report.h"

namespace servoflow::toolkit {
namespace {

constexpr const char* kTiny = R"(
model = "tiny"
device = "cpu"
precision = ["fp32"]
threads = [1]
views = [1]
tokens = [7]
horizon = [4]
steps = [1, 2]
batch = [1, 2]
rounds = 2
samples = 3
warmup_max = 8
open = 2
)";

std::string folder(const std::string& name) {
  const std::string path = testing::TempDir() + "/sf_matrix_" + name;
  std::filesystem::remove_all(path);
  return path;
}

MatrixSpec tiny() {
  const Result<MatrixSpec> spec = parse_matrix(kTiny, "tiny.toml");
  EXPECT_TRUE(spec.ok()) << spec.status().message();
  return *spec;
}

TEST(BenchMatrix, IsEveryCombinationInAnOrderThatSharesPolicies) {
  const MatrixSpec spec = tiny();
  ASSERT_EQ(spec.arms.size(), 4u);
  EXPECT_EQ(arm_text(spec.arms[0]), "fp32, 1 thread, 1 view, 7 tokens, horizon 4, 1 step, batch 1");
  EXPECT_EQ(arm_text(spec.arms[3]), "fp32, 1 thread, 1 view, 7 tokens, horizon 4, 2 steps, batch 2");
  EXPECT_EQ(spec.arms[1].work.batch, 1);  // both steps of a policy before the next policy
  const Result<MatrixSpec> defaults = parse_matrix("model = \"pi05\"", "f");
  ASSERT_TRUE(defaults.ok());
  ASSERT_EQ(defaults->arms.size(), 1u);
  EXPECT_EQ(arm_text(defaults->arms[0]),
            "auto, all threads, 2 views, 200 tokens, horizon 50, 10 steps, batch 1");
}

TEST(BenchMatrix, BadMatricesNameFieldAndCause) {
  const auto expect = [](const std::string& toml, const std::string& what) {
    const Result<MatrixSpec> spec = parse_matrix(toml, "f.toml");
    ASSERT_FALSE(spec.ok()) << what;
    EXPECT_NE(spec.status().message().find(what), std::string::npos) << spec.status().message();
  };
  expect("", "f.toml: model: give either model");
  expect("model = \"tiny\"\ncheckpoint = \"x\"", "give either model");
  expect("model = \"tiny\"\nsteps = 5", "steps: must be a list");
  expect("model = \"tiny\"\nsteps = []", "steps: must be a list with at least one number");
  expect("model = \"tiny\"\nsteps = [5, 51]", "steps[1]: must be an integer between 1 and 50, is 51");
  expect("model = \"tiny\"\nsteps = [\"5\"]", "steps[0]: must be an integer");
  expect("model = \"tiny\"\nsteps = [5, 5]", "steps: holds a value twice");
  expect("model = \"tiny\"\nprecision = [\"bf16\", \"bf16\"]", "precision: holds a value twice");
  expect("model = \"tiny\"\nprecision = \"bf16\"", "precision: must be an array");
  expect("checkpoint = \"x\"\nhorizon = [50]", "horizon: a checkpoint has its own");
  expect("model = \"tiny\"\nrepeat = 5", "repeat: unknown key");
  expect("model = \"tiny\"\nrounds = 0", "rounds: must lie between");
  expect("model = ", "not valid TOML");
  std::string many = "model = \"tiny\"\ntokens = [1";
  for (int i = 2; i <= 60; ++i) many += "," + std::to_string(i);
  expect(many + "]\nthreads = [1,2,3,4,5]\nviews = [1,2,3,4]", "1200 combinations; at most 1024");
  EXPECT_FALSE(read_matrix("/nowhere/m.toml").ok());
}

TEST(BenchMatrix, MeasuresEveryArmInEveryRound) {
  std::uint64_t last = 0, total = 0;
  MatrixOptions options;
  options.running = [&](std::uint64_t done, std::uint64_t all, const std::string&) {
    EXPECT_GE(done, last);
    last = done;
    total = all;
  };
  const MatrixSpec spec = tiny();
  const Result<MatrixResult> r = run_matrix(spec, options);
  ASSERT_TRUE(r.ok()) << r.status().message();
  EXPECT_TRUE(r->complete());
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, 4u * 2 * 3);
  for (const ArmResult& a : r->arms) {
    ASSERT_EQ(a.rounds.size(), 2u);
    for (const MatrixRound& round : a.rounds) {
      ASSERT_EQ(round.end_to_end.size(), 3u);
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_LE(round.vision[i] + round.prefix[i] + round.denoise[i], round.end_to_end[i]);
        EXPECT_GT(round.prefix[i], 0);
      }
    }
    EXPECT_GE(a.warmup_ms.size(), 2u);  // at least one call before each turn
    EXPECT_LE(a.warmup_ms.size(), 9u);
    EXPECT_TRUE(a.same_actions);
    EXPECT_EQ(a.actions.size(), 16u);
    EXPECT_EQ(a.precision, "fp32");
    EXPECT_FALSE(a.backend.empty());
  }
  EXPECT_NE(r->arms[0].actions, r->arms[1].actions);  // other steps, other actions
  for (const char* key :
       {"clock", "what", "order", "warm_up", "statistics", "machine", "machine_after", "build"})
    EXPECT_TRUE(r->protocol.contains(key)) << key;
}

TEST(BenchMatrix, ContinuesWhereItWasStopped) {
  const MatrixSpec spec = tiny();
  MatrixOptions options;
  options.folder = folder("resume");
  int turns = 0;
  options.stop = [&] { return ++turns == 5; };
  const Result<MatrixResult> part = run_matrix(spec, options);
  ASSERT_TRUE(part.ok()) << part.status().message();
  EXPECT_FALSE(part->complete());
  const Result<MatrixResult> kept = read_matrix_result(options.folder + "/matrix.json");
  ASSERT_TRUE(kept.ok()) << kept.status().message();
  EXPECT_FALSE(kept->complete());

  options.stop = nullptr;
  std::uint64_t first = 0;
  options.running = [&](std::uint64_t done, std::uint64_t, const std::string&) {
    if (first == 0) first = done;
  };
  const Result<MatrixResult> whole = run_matrix(spec, options);
  ASSERT_TRUE(whole.ok()) << whole.status().message();
  EXPECT_TRUE(whole->complete());
  EXPECT_EQ(first, 5u * 3);  // what was done is not done again
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_EQ(whole->arms[i].rounds[0].end_to_end, part->arms[i].rounds[0].end_to_end);
  EXPECT_EQ(whole->protocol["continued"].size(), 1u);

  // A finished one is read and not measured again.
  first = 0;
  const Result<MatrixResult> again = run_matrix(spec, options);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(first, 0u);

  // Another matrix, another machine or a broken file in that folder are errors.
  MatrixSpec other = spec;
  other.samples = 4;
  const Result<MatrixResult> mixed = run_matrix(other, options);
  ASSERT_FALSE(mixed.ok());
  EXPECT_NE(mixed.status().message().find("samples was 3, is 4"), std::string::npos)
      << mixed.status().message();
  Json json = *read_json_file(options.folder + "/matrix.json");
  json["protocol"]["machine"]["cpu"] = "another";
  ASSERT_TRUE(write_file_atomically(options.folder + "/matrix.json", json.dump()).ok());
  const Result<MatrixResult> elsewhere = run_matrix(spec, options);
  ASSERT_FALSE(elsewhere.ok());
  EXPECT_NE(elsewhere.status().message().find("cpu was \"another\""), std::string::npos);
  ASSERT_TRUE(write_file_atomically(options.folder + "/matrix.json", std::string("{\"kind\"")).ok());
  EXPECT_FALSE(run_matrix(spec, options).ok());
}

TEST(BenchMatrix, WrongArmsAreErrorsThatNameThem) {
  MatrixSpec spec = tiny();
  spec.arms[0].work.tokens = 60000;
  Result<MatrixResult> r = run_matrix(spec, {});
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("tokens 60000: the model takes at most"), std::string::npos);
  spec = tiny();
  spec.arms[2].work.views = 9;
  r = run_matrix(spec, {});
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("9 views"), std::string::npos) << r.status().message();
  spec = tiny();
  spec.model = "pi06";
  EXPECT_FALSE(run_matrix(spec, {}).ok());
  spec = tiny();
  spec.arms[1].precision = "fp12";
  r = run_matrix(spec, {});
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("fp12, 1 thread"), std::string::npos) << r.status().message();
  spec.arms.clear();
  EXPECT_FALSE(run_matrix(spec, {}).ok());
}

// A result without a run: `arms` arms of 4 rounds of 20 samples around `ms`.
MatrixResult made(double ms, int arms, std::uint64_t seed) {
  MatrixResult out;
  out.matrix = {{"model", "tiny"}, {"checkpoint", ""}};
  out.protocol = {{"machine", {{"cpu", "one"}, {"cores", 2}}}};
  out.rounds_wanted = 4;
  std::mt19937_64 random(seed);
  for (int i = 0; i < arms; ++i) {
    ArmResult a;
    a.arm.precision = a.precision = "fp32";
    a.arm.work.steps = i + 1;
    a.backend = "cpu/x";
    a.actions = "0";
    a.warmup_ms = {20, 11};
    for (int r = 0; r < 4; ++r) {
      MatrixRound round;
      for (int s = 0; s < 20; ++s)
        round.end_to_end.push_back(ms * (0.98 + 0.04 * static_cast<double>(random() % 1000) / 1000));
      round.preprocess = round.vision = round.prefix = round.denoise = round.postprocess =
          std::vector<double>(20, 1);
      a.rounds.push_back(std::move(round));
    }
    out.arms.push_back(std::move(a));
  }
  return out;
}

TEST(BenchMatrix, ResultsReadBackAsTheyWereWritten) {
  const MatrixResult r = made(10, 3, 1);
  const Json json = matrix_to_json(r);
  const Result<MatrixResult> back = matrix_from_json(json, "f");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(matrix_to_json(*back), json);
  EXPECT_TRUE(json["complete"].get<bool>());
  const Json& p50 = json["arms"][0]["summary"]["p50"];
  EXPECT_NEAR(p50["ms"].get<double>(), 10, 0.2);
  EXPECT_LT(p50["low"].get<double>(), p50["ms"].get<double>());
}

TEST(BenchMatrix, BrokenOldFilesAreErrors) {
  const Json good = matrix_to_json(made(10, 2, 1));
  const auto expect = [&](const std::string& pointer, const Json& value, const std::string& what) {
    Json bad = good;
    bad[Json::json_pointer(pointer)] = value;
    const Result<MatrixResult> r = matrix_from_json(bad, "old.json");
    ASSERT_FALSE(r.ok()) << pointer;
    EXPECT_NE(r.status().message().find("old.json: " + what), std::string::npos) << r.status().message();
  };
  expect("/kind", "x", "kind: not a result of `servoflow bench --matrix`");
  expect("/version", 2, "version: is 2, this build reads 1");
  expect("/arms", Json::array(), "arms: is empty");
  expect("/arms/1", 3, "arms[1]: must be an object");
  expect("/arms/1/steps", 99, "arms[1].steps: must lie between");
  expect("/arms/0/rounds/2/end_to_end_ms", {1.0, -1.0}, "arms[0].rounds[2].end_to_end_ms: holds a time");
  expect("/arms/0/rounds/2/end_to_end_ms", {1.0, nullptr}, "arms[0].rounds[2].end_to_end_ms");
  expect("/arms/0/rounds/2/end_to_end_ms", Json::array(), "arms[0].rounds[2].end_to_end_ms: is empty");
  expect("/arms/0/rounds", "many", "arms[0].rounds: must be an array");
  expect("/rounds", 3, "arms[0].rounds: more than `rounds`");
  expect("/protocol", 1, "protocol: must be an object");
  EXPECT_FALSE(matrix_from_json(Json::array(), "old.json").ok());
  EXPECT_FALSE(matrix_from_json(nullptr, "old.json").ok());
  EXPECT_FALSE(read_matrix_result("/nowhere.json").ok());
}

TEST(BenchMatrix, ComparesWithVerdictsAndFailsOnARegression) {
  const MatrixResult old = made(10, 4, 1);
  const auto compare = [&](const MatrixResult& now) { return compare_matrices(now, old, "old.json", 0.02); };
  const Result<MatrixComparison> same = compare(made(10, 4, 2));
  ASSERT_TRUE(same.ok()) << same.status().message();
  EXPECT_TRUE(comparison_outcome(*same).ok());
  EXPECT_NEAR(same->level, 1 - 0.05 / 4, 1e-12);
  for (const ArmComparison& a : same->arms) EXPECT_EQ(a.verdict, Verdict::kWithinNoise);

  MatrixResult slow = made(10, 4, 3);
  slow.arms[2] = made(11, 4, 3).arms[2];
  const Result<MatrixComparison> slower = compare(slow);
  ASSERT_TRUE(slower.ok());
  EXPECT_EQ(slower->arms[2].verdict, Verdict::kSlower);
  EXPECT_EQ(slower->arms[1].verdict, Verdict::kWithinNoise);
  const Status outcome = comparison_outcome(*slower);
  EXPECT_EQ(outcome.code(), StatusCode::kCheckFailed);
  EXPECT_NE(outcome.message().find("3 steps"), std::string::npos) << outcome.message();
  EXPECT_NE(comparison_text(*slower).find("slower"), std::string::npos);

  const Result<MatrixComparison> faster = compare(made(9, 4, 4));
  ASSERT_TRUE(faster.ok());
  EXPECT_EQ(faster->arms[0].verdict, Verdict::kFaster);
  EXPECT_TRUE(comparison_outcome(*faster).ok());

  const Result<MatrixComparison> fewer = compare(made(10, 2, 5));
  ASSERT_TRUE(fewer.ok());
  EXPECT_EQ(fewer->only_before.size(), 2u);
}

TEST(BenchMatrix, OtherMachinesAreNotCompared) {
  const MatrixResult old = made(10, 1, 1);
  MatrixResult now = made(10, 1, 2);
  now.protocol["machine"]["cpu"] = "two";
  const Result<MatrixComparison> r = compare_matrices(now, old, "old.json", 0.02);
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("cpu was \"one\", is \"two\""), std::string::npos);
  now = made(10, 1, 2);
  now.arms[0].hardware = "NVIDIA H100";
  EXPECT_FALSE(compare_matrices(now, old, "old.json", 0.02).ok());
  now = made(10, 1, 2);
  now.matrix["model"] = "pi05";
  EXPECT_FALSE(compare_matrices(now, old, "old.json", 0.02).ok());
  now = made(10, 1, 2);
  now.arms[0].arm.work.steps = 7;
  const Result<MatrixComparison> none = compare_matrices(now, old, "old.json", 0.02);
  ASSERT_FALSE(none.ok());
  EXPECT_NE(none.status().message().find("no arm in common"), std::string::npos);
}

TEST(BenchMatrix, WritesJsonCsvAndHtmlWithTheProtocolInEach) {
  MatrixResult r = made(10, 2, 1);
  r.protocol["clock"] = "the <clock>";
  const std::string summary = matrix_summary_csv(r), samples = matrix_samples_csv(r);
  EXPECT_NE(summary.find("# clock: \"the <clock>\""), std::string::npos);
  EXPECT_EQ(
      std::count(samples.begin(), samples.end(), '\n') - std::count(samples.begin(), samples.end(), '#'),
      1 + 2 * 4 * 20);
  // As many columns in every row as in the header.
  for (const std::string& csv : {summary, samples}) {
    std::istringstream lines(csv);
    long columns = -1;
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("#")) continue;
      const long commas = std::count(line.begin(), line.end(), ',');
      if (columns < 0) columns = commas;
      EXPECT_EQ(commas, columns) << line;
    }
  }
  EXPECT_NE(matrix_text(r).find("1 step"), std::string::npos);
  const Result<MatrixComparison> comparison = compare_matrices(made(11, 2, 3), r, "o", 0.02);
  ASSERT_TRUE(comparison.ok());
  if (plotly_blob().compressed.empty()) GTEST_SKIP() << plotly_blob().why;
  const std::string path = folder("written");
  std::filesystem::create_directories(path);
  ASSERT_TRUE(write_matrix(r, &*comparison, path).ok());
  for (const char* name : {"matrix.json", "samples.csv", "summary.csv", "report.html"})
    EXPECT_TRUE(std::filesystem::exists(path + "/" + name)) << name;
  const Result<std::string> html = read_text_file(path + "/report.html", 64 << 20);
  ASSERT_TRUE(html.ok());
  EXPECT_NE(html->find("the &lt;clock&gt;"), std::string::npos);
  EXPECT_TRUE(read_matrix_result(path + "/matrix.json").ok());
}

}  // namespace
}  // namespace servoflow::toolkit
