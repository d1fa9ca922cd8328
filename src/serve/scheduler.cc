#include "serve/scheduler.h"

#include <algorithm>
#include <exception>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace servoflow::serve {
namespace {

bool fit_together(const Job& a, const Job& b) {
  const RequestOptions &x = a.request->options(), &y = b.request->options();
  return &a.lease->host() == &b.lease->host() && x.steps == y.steps && x.noise.empty() == y.noise.empty();
}

// The engine reports its errors; what it may throw is the standard library out of memory.
template <typename Compute>
Status guarded(const Compute& compute) {
  try {
    return compute();
  } catch (const std::exception& error) {
    return Status::runtime(std::string("inference: ") + error.what());
  }
}

// What a request says about its session, before it is computed.
void begin_episode(const Job& job) {
  const RequestOptions& options = job.request->options();
  bool anew = options.reset;
  if (options.episode) {
    anew = anew || (job.lease->episode && job.lease->episode != options.episode);
    job.lease->episode = options.episode;
  }
  if (options.seed) {
    job.lease->session().reset(*options.seed);
  } else if (anew) {
    job.lease->session().reset();
  }
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, Metrics& metrics)
    : options_(options), metrics_(metrics), thread_([this] { run(); }) {}

Scheduler::~Scheduler() { stop(); }

void Scheduler::stop() {
  {
    const std::lock_guard guard(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  fail_waiting();
}

void Scheduler::fail_waiting() {
  std::list<Job> waiting;
  {
    const std::lock_guard guard(mutex_);
    waiting.swap(queue_);
    metrics_.queue_length = 0;
  }
  for (Job& job : waiting)
    job.done({.status = Status::runtime("request: cut off, the server is shutting down")});
}

bool Scheduler::submit(Job& job) {
  {
    const std::lock_guard guard(mutex_);
    if (stopping_ || queue_.size() >= options_.capacity) return false;
    queue_.push_back(std::move(job));
    metrics_.queue_length = static_cast<std::int64_t>(queue_.size());
  }
  changed_.notify_all();
  return true;
}

void Scheduler::forget(std::uint64_t client) {
  std::list<Job> gone;  // destroyed outside the lock
  const std::lock_guard guard(mutex_);
  for (auto it = queue_.begin(); it != queue_.end();) {
    const auto next = std::next(it);
    if (it->client == client) gone.splice(gone.end(), queue_, it);
    it = next;
  }
  metrics_.queue_length = static_cast<std::int64_t>(queue_.size());
}

void Scheduler::set_clients(int clients) {
  {
    const std::lock_guard guard(mutex_);
    clients_ = clients;
  }
  changed_.notify_all();
}

std::size_t Scheduler::pending() const {
  const std::lock_guard guard(mutex_);
  return queue_.size() + computing_;
}

std::vector<std::list<Job>::iterator> Scheduler::choose() {
  std::set<std::uint64_t> seen;
  std::vector<std::list<Job>::iterator> heads, chosen;
  for (auto it = queue_.begin(); it != queue_.end(); ++it)
    if (seen.insert(it->client).second) heads.push_back(it);
  std::stable_sort(heads.begin(), heads.end(), [](auto a, auto b) { return a->deadline < b->deadline; });
  if (heads.empty()) return chosen;
  const int most = std::min(options_.max_batch, heads.front()->lease->host().info().max_batch);
  std::map<std::string, int> on_device;
  for (const auto& head : heads) {
    if (!fit_together(*heads.front(), *head)) continue;
    int& count = on_device[head->lease->session().device().device];
    if (count == most) continue;
    ++count;
    chosen.push_back(head);
  }
  return chosen;
}

Scheduler::Batch Scheduler::next_batch() {
  std::unique_lock lock(mutex_);
  std::vector<std::list<Job>::iterator> chosen;
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (stopping_) return {};
    chosen = choose();
    const PolicyInfo& info = chosen.front()->lease->host().info();
    const int most = std::min(options_.max_batch, info.max_batch);
    const bool full = chosen.size() >= static_cast<std::size_t>(most) * info.devices.size();
    std::set<std::uint64_t> waiting;
    for (const Job& job : queue_) waiting.insert(job.client);
    const bool all_here = static_cast<int>(waiting.size()) >= clients_;
    const auto oldest = std::min_element(chosen.begin(), chosen.end(),
                                         [](auto a, auto b) { return a->received < b->received; });
    const Clock::time_point until = (*oldest)->received + options_.max_wait;
    if (full || all_here || Clock::now() >= until) break;
    changed_.wait_until(lock, until);
  }
  Batch batch;
  for (const auto& it : chosen) {
    batch.push_back(std::move(*it));
    queue_.erase(it);
  }
  computing_ = batch.size();
  metrics_.queue_length = static_cast<std::int64_t>(queue_.size());
  return batch;
}

void Scheduler::run() {
  while (true) {
    Batch batch = next_batch();
    if (batch.empty()) return;
    compute(batch);
    batch.clear();
    const std::lock_guard guard(mutex_);
    computing_ = 0;
  }
}

void Scheduler::compute(Batch& batch) {
  const std::size_t count = batch.size();
  const Clock::time_point begin = Clock::now();
  std::vector<Session*> sessions;
  std::vector<const Observation*> observations;
  std::vector<ActionChunk> chunks(count);
  std::vector<float> noise;
  InferOptions options{.steps = batch[0].request->options().steps};
  for (Job& job : batch) {
    begin_episode(job);
    sessions.push_back(&job.lease->session());
    observations.push_back(&job.request->observation());
    const std::vector<float>& given = job.request->options().noise;
    noise.insert(noise.end(), given.begin(), given.end());
    options.keep_noise = options.keep_noise || job.keep_noise;
  }
  options.noise = noise;
  std::vector<Status> statuses(count);
  std::vector<int> together(count, static_cast<int>(count));
  const Status all = guarded([&] { return infer_batch(sessions, observations, options, chunks); });
  if (!all.ok() && count == 1) statuses[0] = all;
  if (!all.ok() && count > 1) {
    // One of them spoils it; each alone tells which. Those that got through already keep their chunk.
    const std::size_t each = noise.size() / count;
    for (std::size_t i = 0; i < count; ++i) {
      if (chunks[i].horizon > 0) continue;
      InferOptions alone = options;
      if (each > 0) alone.noise = std::span<const float>(noise).subspan(i * each, each);
      together[i] = 1;
      statuses[i] = guarded([&] { return sessions[i]->infer_into(*observations[i], alone, chunks[i]); });
    }
  }
  const Clock::time_point end = Clock::now();
  metrics_.batch_size.observe(static_cast<double>(count));
  const double infer_ms = milliseconds(end - begin);
  for (std::size_t i = 0; i < count; ++i) {
    Job& job = batch[i];
    Answer answer{.status = std::move(statuses[i]),
                  .chunk = std::move(chunks[i]),
                  .batch = together[i],
                  .queue_ms = milliseconds(begin - job.received),
                  .infer_ms = infer_ms};
    metrics_.observe_ms(Stage::kQueue, answer.queue_ms);
    metrics_.observe_ms(Stage::kInfer, infer_ms);
    if (answer.status.ok()) {
      const StageTimes& times = answer.chunk.times;
      metrics_.observe_ms(Stage::kPreprocess, times.preprocess);
      metrics_.observe_ms(Stage::kVision, times.vision);
      metrics_.observe_ms(Stage::kPrefix, times.prefix);
      metrics_.observe_ms(Stage::kDenoise, times.denoise);
      metrics_.observe_ms(Stage::kPostprocess, times.postprocess);
    }
    if (job.request->options().deadline_ms && end > job.deadline) ++metrics_.deadlines_missed;
    job.done(std::move(answer));
  }
}

}  // namespace servoflow::serve
