// A call that is not plainly fine is left to Python: these functions call what flash_attn_ext/interface.py has
// registered, which raises what is wrong, in its words, or returns, and then the call goes on.
#pragma once

#include <ATen/core/Tensor.h>

#include "../problem.h"

namespace flash_attn_ext::python {

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options::Types& options);

void check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, const at::Tensor& lse, const Options::Types& options);

// Of a call with an input that has a tangent, or that requires a gradient that cannot be computed.
void check_derivatives(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options::Types& options);

// Always raises.
void refuse_gradient_of_lse();

}  // namespace flash_attn_ext::python
