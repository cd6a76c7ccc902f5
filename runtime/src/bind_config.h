// The check of a configuration, for the bindings that take one.
#pragma once

#include "engine_config.h"

// Throws std::invalid_argument naming what does not fit.
void check_config(const edge_moe::EngineConfig& config);
