// Adds the attention kernels to the module of the CPU kernels.
#pragma once

#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& module);
