# Plotly's JavaScript for the HTML reports (src/toolkit/html_report.h). It is not part of this tree: the Python package
# that carries it is fetched from PyPI once, checked against its hash, and kept compressed for all builds of the tree.
# Without network the build goes on, and writing a report with figures is an error that says what to do.
#
# Sets SF_PLOTLY_FILE to the compressed file, or to nothing.
option(SF_PLOTLY "Fetch plotly.js from PyPI and build it in, for HTML reports with figures" ON)
set(SF_PLOTLY_DIR ${CMAKE_SOURCE_DIR}/build/plotly CACHE PATH "Where the fetched plotly.js is kept")
set(SF_PLOTLY_FILE "")
set(SF_PLOTLY_WHY "this build was configured without it (SF_PLOTLY)")
# The Python extension and the fuzz targets write no reports.
if(SF_PLOTLY AND NOT SF_PYTHON AND NOT SF_FUZZ)
  find_program(SF_PYTHON3 python3)
  execute_process(COMMAND ${SF_PYTHON3} ${CMAKE_SOURCE_DIR}/cmake/fetch_plotly.py ${SF_PLOTLY_DIR}
    OUTPUT_VARIABLE SF_PLOTLY_FILE OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE problem RESULT_VARIABLE failed)
  if(failed)
    set(SF_PLOTLY_FILE "")
    set(SF_PLOTLY_WHY "plotly.js could not be fetched from PyPI when this build was configured")
    message(WARNING "HTML reports will have no figures: ${problem}Configure again with network to mend that.")
  endif()
endif()
