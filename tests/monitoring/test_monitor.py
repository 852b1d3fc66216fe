import numpy as np, time, json
from monitoring.monitor import Monitor

def test_it(make_bundle, draw):
    for kw in ({}, dict(lost=(3,8)), dict(fakes=.05), dict(fakes=.3), dict(width=.8), dict(grain=1.0), dict(grain=.1), dict(lost=(3,8), honest=True)):
        b = make_bundle(**kw)
        x = draw(b, 30000, seed=5)
        m = Monitor(b)
        t=time.perf_counter()
        for i in range(0,len(x),64): m.update(x[i:i+64], fresh=True, at=float(i))
        dt=time.perf_counter()-t
        print(kw, m.first_alarm, m.verdict.id, m.verdict.modes, m.evidence(), f"{dt/len(x)*1e6:.1f} us", len(m._detector._bets))
        t=time.perf_counter(); s=m.snapshot(); print("snapshot", time.perf_counter()-t)
        for k,g in m.gauges("fresh").items(): print("   ",k,g)
