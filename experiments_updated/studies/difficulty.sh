#!/usr/bin/env bash
# Does Read attend to what is difficult? Its attention to each patch against the patch's loss, in the quick start's model.
. "$(dirname "$0")/common.sh"
quickstart
report quickstart
