#pragma once

namespace fastrnn {

// Register the raw layer ops on a CPU, once.
void register_ops();

}  // namespace fastrnn
