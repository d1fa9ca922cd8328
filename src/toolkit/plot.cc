#include "toolkit/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace servoflow::toolkit {
namespace {

constexpr double kPanelWidth = 300, kPanelHeight = 170, kHeader = 64, kMargin = 16;
constexpr double kLeft = 58, kRight = 12, kTop = 26, kBottom = 38;  // inside a panel, around the axes
constexpr int kColumns = 3;

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      // Control characters are not allowed in XML; bytes beyond ASCII may not be UTF-8.
      default:
        out += static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f ? '?' : c;
    }
  }
  return out;
}

std::string text_at(double x, double y, const char* anchor, int size, const std::string& color,
                    const std::string& text) {
  return fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" font-size=\"{}\" fill=\"{}\">{}</text>\n", x, y,
      anchor, size, color, escaped(text));
}

std::string line(double x1, double y1, double x2, double y2, const char* color) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"/>\n", x1,
                     y1, x2, y2, color);
}

std::string panel(const ActionChunk& chunk, int dim, double x0, double y0, const PlotOptions& options) {
  const auto value = [&](int h) {
    return chunk.actions[static_cast<std::size_t>(h) * static_cast<std::size_t>(chunk.action_dim) +
                         static_cast<std::size_t>(dim)];
  };
  double low = INFINITY, high = -INFINITY;
  for (int h = 0; h < chunk.horizon; ++h) {
    if (!std::isfinite(value(h))) continue;
    low = std::min(low, value(h));
    high = std::max(high, value(h));
  }
  if (!(low <= high)) low = high = 0;
  const std::vector<double> ticks = axis_ticks(low, high);
  const double bottom = ticks.front(), top = ticks.back();
  const double left = x0 + kLeft, right = x0 + kPanelWidth - kRight, above = y0 + kTop,
               below = y0 + kPanelHeight - kBottom;
  const auto px = [&](double h) {
    return left + (right - left) * (chunk.horizon > 1 ? h / (chunk.horizon - 1) : 0.5);
  };
  const auto py = [&](double v) { return below - (below - above) * (v - bottom) / (top - bottom); };

  const std::string label = static_cast<std::size_t>(dim) < options.labels.size()
                                ? options.labels[static_cast<std::size_t>(dim)]
                                : fmt::format("a{}", dim);
  std::string out = text_at(left, y0 + 16, "start", 12, "#222", fmt::format("{} [{}]", label, options.unit));
  for (double t : ticks) {
    out += line(left, py(t), right, py(t), "#e4e4e4");
    out += text_at(left - 6, py(t) + 3.5, "end", 10, "#555", fmt::format("{:.6g}", t));
  }
  for (double t : axis_ticks(0, std::max(chunk.horizon - 1, 1))) {
    if (t > chunk.horizon - 1 || t != std::floor(t)) continue;
    out += line(px(t), below, px(t), below + 4, "#555");
    out += text_at(px(t), below + 15, "middle", 10, "#555", fmt::format("{:.0f}", t));
  }
  out += line(left, above, left, below, "#555") + line(left, below, right, below, "#555");
  out += text_at((left + right) / 2, below + 29, "middle", 10, "#555", "action step");

  std::string points;
  const auto flush = [&] {
    if (!points.empty())
      out += "<polyline fill=\"none\" stroke=\"#1f6fb4\" stroke-width=\"1.8\" points=\"" + points + "\"/>\n";
    points.clear();
  };
  std::string dots;
  for (int h = 0; h < chunk.horizon; ++h) {
    if (!std::isfinite(value(h))) {
      flush();  // a gap, not a line across it
      continue;
    }
    points += fmt::format("{:.2f},{:.2f} ", px(h), py(value(h)));
    if (chunk.horizon <= 64)
      dots += fmt::format("<circle cx=\"{:.2f}\" cy=\"{:.2f}\" r=\"2\" fill=\"#1f6fb4\"/>\n", px(h),
                          py(value(h)));
  }
  flush();
  return out + dots;
}

}  // namespace

std::vector<double> axis_ticks(double low, double high) {
  if (!(high > low)) {
    const double room = std::max(std::abs(low) * 0.1, 1e-3);
    high = low + room;
    low -= room;
  }
  const double rough = (high - low) / 4, power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (double nice : {1.0, 2.0, 2.5, 5.0})
    if (nice * power >= rough) {
      step = nice * power;
      break;
    }
  std::vector<double> out;
  const double first = std::floor(low / step), last = std::ceil(high / step);
  for (double k = first; k <= last && out.size() < 32; k += 1) out.push_back(k * step);
  return out;
}

std::string plot_actions_svg(const ActionChunk& chunk, const PlotOptions& options) {
  const int dims = chunk.horizon > 0 ? chunk.action_dim : 0;
  const int columns = std::clamp(dims, 1, kColumns), rows = std::max((dims + columns - 1) / columns, 1);
  const double width = columns * kPanelWidth + 2 * kMargin, height = kHeader + rows * kPanelHeight + kMargin;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} "
      "{1:.0f}\" "
      "font-family=\"sans-serif\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
      width, height);
  out += text_at(kMargin, 28, "start", 16, "#222", options.title);
  out += text_at(kMargin, 48, "start", 11, "#555", options.subtitle);
  for (int d = 0; d < dims; ++d) {
    const int down = d / columns, across = d % columns;
    out += panel(chunk, d, kMargin + across * kPanelWidth, kHeader + down * kPanelHeight, options);
  }
  return out + "</svg>\n";
}

}  // namespace servoflow::toolkit
