import numpy as np
def test_it(make_bundle, draw):
    for kw in ({}, dict(lost=(3,8)), dict(fakes=.05), dict(width=.8), dict(grain=1.0), dict(grain=.1), dict(lost=(3,8), honest=True)):
        b = make_bundle(**kw)
        x = draw(b, 10000)
        print(kw, x.shape, x.dtype, b.certificate.cell_count, b.certificate.duplicate_hits, len(np.unique(x,axis=0)))
        k=((x[:,None]-2*np.stack([np.arange(10)%5-2,np.arange(10)//5-.5],1))**2).sum(-1)
        print(np.bincount(k.argmin(1), minlength=10), np.sqrt(k.min(1)).mean())
    print(b.certificate.upper_hits, b.certificate.lower_hits)
