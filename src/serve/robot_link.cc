#include "serve/robot_link.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace servoflow::serve {
namespace {

using Level = EventLog::Level;
constexpr const char* kReasonBefore = "The reason is in the text frame before this one.";

// A text frame must be UTF-8, whatever a message quotes.
std::string as_text(std::string text) {
  if (!is_utf8(text))
    for (char& c : text)
      if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  return text;
}

// A user's metadata as msgpack; JSON's kinds have their own there.
void write_json(WireWriter& out, const nlohmann::json& value) {
  if (value.is_object()) {
    out.map(value.size());
    for (const auto& [key, item] : value.items()) {
      out.text(key);
      write_json(out, item);
    }
  } else if (value.is_array()) {
    out.list(value.size());
    for (const auto& item : value) write_json(out, item);
  } else if (value.is_string()) {
    out.text(value.get_ref<const std::string&>());
  } else if (value.is_boolean()) {
    out.boolean(value.get<bool>());
  } else if (value.is_number_unsigned()) {
    out.whole(value.get<std::uint64_t>());
  } else if (value.is_number()) {
    out.real(value.get<double>());
  } else {
    out.nil();
  }
}

}  // namespace

RobotLink::RobotLink(Context& context, Transport& transport, std::string peer)
    : context_(context),
      transport_(transport),
      id_(context.next_client++),
      peer_(std::move(peer)),
      rate_(context.options.max_rate) {
  ++context_.metrics.connections;
  ++context_.metrics.connections_opened;
}

RobotLink::~RobotLink() = default;

void RobotLink::on_open() {
  const std::shared_ptr<PolicyHost> host = context_.host();
  lease_ = host->lease();
  turn_begin_ = Clock::now();
  context_.scheduler.set_clients(context_.robots);
  context_.log.write(Level::kInfo, "connected", {{"client", id_}, {"peer", peer_}});
  if (lease_ == nullptr)
    return refuse(Cause::kConnections, "connection: all sessions are in use; try again", kTryAgainLater, "");

  nlohmann::json metadata = {{"server", "servoflow"},
                             {"version", context_.options.version},
                             {"robot", host->schema()->robot},
                             {"contract_hash", host->contract_hash()},
                             {"precision", host->info().precision},
                             {"device", host->info().device},
                             {"backend", host->info().backend},
                             {"action_horizon", host->info().horizon},
                             {"action_dim", host->schema()->action_width}};
  if (!context_.metadata_json.empty()) metadata.update(nlohmann::json::parse(context_.metadata_json));
  WireWriter out;
  write_json(out, metadata);
  transport_.send(out.take());
}

void RobotLink::refuse(Cause cause, const std::string& reason, std::uint16_t code, const std::string& trace) {
  context_.metrics.fail(cause);
  context_.log.write(
      Level::kWarn, "refused",
      {{"client", id_}, {"peer", peer_}, {"trace", trace}, {"cause", cause_name(cause)}, {"reason", reason}});
  if (refusal_ || closing_) return;
  refusal_ = Refusal{as_text(reason) + (trace.empty() ? "" : "\n(trace " + trace + ")"), kReasonBefore, code};
  close_when_idle();
}

void RobotLink::close_when_idle() {
  if (!refusal_ || closing_ || closed_ || outstanding_ > 0) return;
  closing_ = true;
  transport_.close(std::move(refusal_->text), refusal_->code, std::move(refusal_->reason));
}

void RobotLink::drain() {
  if (refusal_ || closing_) return;
  refusal_ = Refusal{"", "The server is shutting down.", kGoingAway};
  close_when_idle();
}

void RobotLink::on_message(std::vector<std::uint8_t> message, bool is_text) {
  const Clock::time_point received = Clock::now();
  ++context_.metrics.requests;
  const std::string trace =
      context_.trace_prefix + "-" + std::to_string(id_) + "-" + std::to_string(requests_++);
  if (context_.draining) {
    // What closes the connection says it all, but a client that just sent something waits for an answer.
    if (!closing_) refusal_.reset();
    return refuse(Cause::kShutdown, "request: refused, the server is shutting down", kGoingAway, trace);
  }
  if (refusal_ || closing_) return;  // this connection is ending; it was told why
  if (!rate_.take(received))
    return refuse(Cause::kRate,
                  "request: more than " +
                      std::to_string(static_cast<std::int64_t>(context_.options.max_rate)) +
                      " a second on one connection (--max-rate)",
                  kTryAgainLater, trace);
  // Replies that the client has not taken yet count as well.
  const int unanswered = outstanding_ + static_cast<int>(sending_.size());
  if (unanswered >= context_.options.max_outstanding)
    return refuse(Cause::kOutstanding,
                  "request: " + std::to_string(unanswered) +
                      " requests of this connection wait for their answers already (--max-outstanding)",
                  kTryAgainLater, trace);
  if (is_text)
    return refuse(Cause::kBadRequest, "message: a text frame; observations are binary msgpack",
                  kInternalError, trace);

  // A checkpoint that was reloaded takes over with the next request.
  if (const std::shared_ptr<PolicyHost> host = context_.host(); &lease_->host() != host.get()) {
    std::shared_ptr<SessionLease> fresh = host->lease();
    if (fresh == nullptr)
      return refuse(Cause::kConnections, "connection: all sessions are in use; try again", kTryAgainLater,
                    trace);
    lease_ = std::move(fresh);
  }
  Result<Request> decoded = Request::decode(std::move(message), lease_->host().schema(), context_.limits);
  const double decode_ms = milliseconds(Clock::now() - received);
  context_.metrics.observe_ms(Stage::kDecode, decode_ms);
  if (!decoded.ok()) return refuse(Cause::kBadRequest, decoded.status().message(), kInternalError, trace);

  const auto request = std::make_shared<const Request>(*std::move(decoded));
  constexpr double kDefaultDeadlineMs = 1000;  // orders those that name none by their arrival
  const double deadline_ms = request->options().deadline_ms.value_or(kDefaultDeadlineMs);
  Job job{.client = id_,
          .lease = lease_,
          .request = request,
          .received = received,
          .deadline = received + std::chrono::duration_cast<Clock::duration>(
                                     std::chrono::duration<double, std::milli>(deadline_ms)),
          .keep_noise = context_.recorder != nullptr};
  job.done = [this, self = transport_.shared_from_this(), request, lease = lease_, received, decode_ms,
              trace](Answer answer) {
    auto shared = std::make_shared<Answer>(std::move(answer));
    self->post([this, self, shared, request, lease, received, decode_ms, trace] {
      on_answer(shared, request, lease, received, decode_ms, trace);
    });
  };
  if (!context_.scheduler.submit(job))
    return refuse(Cause::kQueueFull,
                  "request: the queue is full (" + std::to_string(context_.options.queue) +
                      " requests wait, --queue); try again",
                  kTryAgainLater, trace);
  ++outstanding_;
}

std::string RobotLink::encode(const Answer& answer, const SessionLease& lease, double decode_ms,
                              const std::string& trace, bool late) const {
  const ActionChunk& chunk = answer.chunk;
  const std::size_t shape[] = {static_cast<std::size_t>(chunk.horizon),
                               static_cast<std::size_t>(chunk.action_dim)};
  WireWriter out;
  out.map(4).text("actions");
  if (lease.host().schema()->has_action_statistics) {
    out.array(std::span<const double>(chunk.actions), shape);
  } else {
    const std::vector<float> narrow(chunk.actions.begin(), chunk.actions.end());
    out.array(std::span<const float>(narrow), shape);
  }
  // Numbers only: clients print these maps as tables.
  out.text("policy_timing").map(6);
  out.text("infer_ms").real(answer.infer_ms);
  out.text("preprocess_ms").real(chunk.times.preprocess);
  out.text("vision_ms").real(chunk.times.vision);
  out.text("prefix_ms").real(chunk.times.prefix);
  out.text("denoise_ms").real(chunk.times.denoise);
  out.text("postprocess_ms").real(chunk.times.postprocess);
  out.text("server_timing").map(previous_total_ms_ ? 5 : 4);
  out.text("infer_ms").real(answer.infer_ms);
  out.text("queue_ms").real(answer.queue_ms);
  out.text("decode_ms").real(decode_ms);
  out.text("batch").whole(static_cast<std::uint64_t>(answer.batch));
  if (previous_total_ms_) out.text("prev_total_ms").real(*previous_total_ms_);
  out.text("servoflow").map(6);
  out.text("trace").text(trace);
  out.text("request").whole(chunk.request);
  out.text("contract_hash").text(chunk.contract_hash);
  out.text("generation").whole(lease.host().generation());
  out.text("prompt_truncated").boolean(chunk.prompt_truncated);
  out.text("deadline_missed").boolean(late);
  return out.take();
}

void RobotLink::on_answer(std::shared_ptr<Answer> answer, const std::shared_ptr<const Request>& request,
                          const std::shared_ptr<SessionLease>& lease, Clock::time_point received,
                          double decode_ms, const std::string& trace) {
  --outstanding_;
  if (closed_ || closing_) return;
  if (!answer->status.ok()) {
    const bool going = context_.draining;
    refuse(going ? Cause::kShutdown : Cause::kInference, answer->status.message(),
           going ? kGoingAway : kInternalError, trace);
    return close_when_idle();
  }
  const double total_ms = milliseconds(Clock::now() - received);
  const bool late = request->options().deadline_ms && total_ms > *request->options().deadline_ms;
  std::string reply = encode(*answer, *lease, decode_ms, trace, late);
  // Counted before it leaves: who holds a reply and then asks for the metrics finds it there.
  ++replies_;
  ++context_.metrics.replies;
  context_.metrics.observe_ms(Stage::kTotal, total_ms);
  sending_.push_back(Clock::now());
  transport_.send(std::move(reply));
  if (context_.log.enabled(Level::kDebug))
    context_.log.write(Level::kDebug, "answered",
                       {{"client", id_},
                        {"trace", trace},
                        {"total_ms", total_ms},
                        {"queue_ms", answer->queue_ms},
                        {"infer_ms", answer->infer_ms},
                        {"batch", answer->batch},
                        {"bytes", request->message_bytes()}});
  if (context_.recorder) context_.recorder->add({trace, request, std::move(answer->chunk), lease});
  close_when_idle();
}

void RobotLink::on_sent() {
  if (sending_.empty()) return;  // it was the metadata
  const Clock::time_point now = Clock::now();
  context_.metrics.observe_ms(Stage::kSend, milliseconds(now - sending_.front()));
  sending_.pop_front();
  previous_total_ms_ = milliseconds(now - turn_begin_);
  turn_begin_ = now;
}

void RobotLink::on_closed(std::optional<Cause> cause, const std::string& detail) {
  if (closed_) return;
  closed_ = true;
  if (cause) context_.metrics.fail(*cause);
  --context_.metrics.connections;
  context_.scheduler.forget(id_);
  context_.scheduler.set_clients(context_.robots);
  EventLog::Fields fields = {
      {"client", id_}, {"peer", peer_}, {"requests", requests_}, {"replies", replies_}, {"detail", detail}};
  if (cause) fields["cause"] = cause_name(*cause);
  context_.log.write(cause ? Level::kWarn : Level::kInfo, "disconnected", fields);
  lease_.reset();
}

}  // namespace servoflow::serve
