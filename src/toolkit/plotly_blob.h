// The JavaScript that draws the figures of HTML reports, as it was built in (cmake/plotly.cmake).
#pragma once

#include <string_view>

namespace servoflow::toolkit {

struct PlotlyBlob {
  std::string_view compressed;  // by zlib; empty: not built in
  std::string_view why;         // it is not
};

PlotlyBlob plotly_blob();

}  // namespace servoflow::toolkit
