from test_mxfp4 import *
def test_x(released,plain):
  for p in (released, plain):
   for n in (64, 256):
    kw={} if p is released else dict(recipe=lf.Recipe(base="bf16"))
    found = lf.estimate(str(p), "lora", batch=2, length=n, measure=True, device="cpu", **kw)
    print(n, found.total, found.measured, found.terms)
  assert 0
