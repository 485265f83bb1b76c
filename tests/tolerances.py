"""Every tolerance of the suite, each with where it comes from. None is ever relaxed to pass."""

# float64, relative to the largest entry of the expected tensor. A sum of n products errs by at
# most n u of the sum of their magnitudes, u = 1.1e-16. The longest sum in these tests has 30 terms
# and a tensor is at most 9 sums deep (4 layers forward, the loss, 4 back): 30 * 9 * u = 3e-14,
# times 30 for magnitudes that cancel. Real mistakes are of order 1.
FLOAT64 = 1e-12

# sigma, sigma' and the losses of single numbers in float64: a formula of about ten operations,
# each with an error of one ulp (2.2e-16), against another formula for the same function.
ELEMENTWISE = 1e-14

# jax.grad of a formula against the formula of its derivative. Where a unit saturates jax.grad
# subtracts equal numbers (1 - s(z) and the like), so the error is absolute: 30 ulp of arguments
# up to 30.
AUTODIFF = 30 * 30 * 2.3e-16

# Rounding to bfloat16, which keeps 8 bits, errs by at most 2^-8 of the number. Two roundings of
# factors err by 2^-16 more than their sum, which 1 % of one covers.
BFLOAT16_ROUNDOFF = 1.01 * 2**-8

# A sum in float32 of 30 products, relative to the sum of their magnitudes: 30 * 2^-24. sigma and
# the like add a formula's ten ulp of 2^-23, to numbers that are not larger.
FLOAT32_SUM = 30 * 2**-24 + 10 * 2**-23

# A central difference of gradients, a step of 1e-4 either way along v, against the derivative along
# v. It errs by 1e-8 / 6 of the third derivative, for functions of this size a hundred times the
# second at most, and by the rounding of gradients, FLOAT64 / 1e-4 relative to them.
CENTRAL_DIFFERENCE = 1e-6
