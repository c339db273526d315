#!/usr/bin/env bash
# Does ELIT learn faster? The quick start's two models, whose batches have the same draws: loss against steps and FLOPs.
. "$(dirname "$0")/common.sh"
quickstart
report quickstart_sit quickstart
