#!/bin/sh
# One session that outlives its process: goes on with the latest paper session where that died, begins a new one otherwise.
# Arguments are those of `trader paper`. SESSION_TRUST: hashes of code outside the project that a resumed run may name. Used by the container image and the systemd unit, whose supervisors start it again.
set -eu
condition=$(trader status latest-paper --json 2>/dev/null |
	python3 -c 'import json, sys; print(json.load(sys.stdin)["condition"])' 2>/dev/null) || condition=none
if [ "$condition" = dead ]; then
	exec trader paper --resume latest-paper ${SESSION_TRUST:+--trust="$SESSION_TRUST"}
fi
exec trader paper "$@"
