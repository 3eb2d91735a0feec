#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Run the cells of a matrix as a job array of Slurm, and merge them:
#     examples/slurm/matrix.sh MATRIX.toml OUTPUT [OPTION OF sbatch…]
# OUTPUT and the cache must be on a file system that all nodes share. A job that is requeued leaves
# out its cell if that has ended.
set -eu
FILE=$1 OUTPUT=$2
export FILE OUTPUT
shift 2
mkdir -p "$OUTPUT"
paprscm matrix list "$FILE" > "$OUTPUT/cells.txt"
last=$(($(wc -l < "$OUTPUT/cells.txt") - 1))
array=$(sbatch --parsable --job-name=paprscm --array="0-$last" --requeue --export=ALL \
	--output="$OUTPUT/slurm-%a.log" "$@" << 'END'
#!/bin/sh
cell=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$OUTPUT/cells.txt")
exec paprscm matrix run "$FILE" --cell "$cell" --resume --output "$OUTPUT"
END
)
# After the last cell, however the cells ended.
# shellcheck disable=SC2016 # the job expands them
sbatch --parsable --job-name=paprscm-merge --dependency="afterany:${array%%;*}" --export=ALL \
	--output="$OUTPUT/merge.log" "$@" \
	--wrap 'paprscm matrix merge "$OUTPUT" --file "$FILE" --output "$OUTPUT"'
