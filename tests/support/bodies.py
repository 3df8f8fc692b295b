"""The function bodies as tests run them: the product's own way, which `angelforge bench kernels` takes too."""

from angelforge.runtime.validate.bodies import Attributes as Attributes
from angelforge.runtime.validate.bodies import body_model as body_model
from angelforge.runtime.validate.bodies import run_body as run_body
from angelforge.runtime.validate.bodies import run_reference as run_reference
