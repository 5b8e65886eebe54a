# Sourced before another example, it makes that run in the small world of the package on any computer, in a
# minute or two:    . examples/small.sh && bash examples/pickapic-sd15.sh
world=$(python -c 'import fifa.moji.family as moji; print(moji.FEEDBACK.parent)')
export SOURCE=$world/feedback.parquet MODEL=$world/moji-sd
export MARGIN=column:clipscore_0,clipscore_1 SCORER=clipscore:$world/moji-clip PROMPTS=small-prompts.txt
export SAFETY=none QUALITY=none DIVERSITY=none KEEP=20 TRAIN="--method full --steps 2 --batch 4 --device cpu"
export EVALUATE="--limit 2 --seeds 1 --steps 2 --batch 8 --encoder none"
printf '%s\n' 'cat on a blue background' 'red apple on a white background' >small-prompts.txt
