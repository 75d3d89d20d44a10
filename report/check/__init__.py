"""The checker: KVM's invariants I1..I50 (spec §4.4) held against the events of a run.

Written from the rules alone: it shares no code with host/ and guest/, so that a mistake there is not repeated here.

rules.py    the invariants: number, sentence, which profiles have it, what of it the events show
profiles.py what the rules of a profile ask for
api.py      checks a run directory, event files, recordings
state.py    what is remembered of a vCPU and of a live token, in arrays
host_side.py, ready_side.py, guest_side.py, msr.py, state_side.py   compiled: what one event may do
engine.py   compiled: the loop over events, and the look at the end
checker.py  feeds events in, collects what was found
source.py   event files of a run that has ended, merged in windows of bounded size
online.py   event files of a run under way, merged as far as every process has promised
warm.py     compiles the rules once
recorded.py JSON lines of recorded kernels
verdict.py  the result, as values and as text
"""
