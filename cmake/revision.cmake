# cmake -DSOURCE=… -DTEMPLATE=… -DHEADER=… -P revision.cmake: fills the sources' revision as it is now into TEMPLATE.
# HEADER is written only if that changes it.
execute_process(COMMAND git describe --always --dirty --tags WORKING_DIRECTORY ${SOURCE}
                OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
configure_file(${TEMPLATE} ${HEADER} @ONLY)
