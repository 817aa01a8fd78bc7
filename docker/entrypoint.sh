#!/bin/sh
# Entry point of the image.
#
#   moe-entrypoint COMMAND ...               moe-train COMMAND ... (train looks at the machine first, as doctor does)
#   moe-entrypoint deepspeed train ...       DeepSpeed's launcher: MOE_TRAIN_HOSTFILE, or the same command on each node
#   moe-entrypoint torchrun train ...        torch's launcher, the same command on each node
#   moe-entrypoint srun train ...            the same under srun, one task on each node
#   moe-entrypoint sshd                      a node that waits for the one with the MOE_TRAIN_HOSTFILE
#   moe-entrypoint live                      whether the run's heartbeat goes on, for health checks
#   moe-entrypoint -- PROGRAM ...            any program
#
# docs/docker.md tells the variables. What it starts takes its place, so that signals reach it.
set -eu

say() {
    echo "moe-entrypoint: $*" >&2
}

fail() {
    say "$*"
    exit 2 # wrong input: a second try would meet the same
}

# The value of the first of these variables that is set.
first() {
    for name; do
        eval "value=\${$name:-}"
        if [ -n "$value" ]; then
            echo "$value"
            return
        fi
    done
}

# Keys lie in a folder that is mounted, often owned by somebody else; ssh wants its own.
prepare_ssh() {
    keys=${MOE_TRAIN_SSH_KEYS:-/run/secrets/ssh}
    port=${MOE_TRAIN_SSH_PORT:-2222}
    mkdir -p "$HOME/.ssh"
    chmod 700 "$HOME/.ssh"
    for name in id authorized_keys host_key; do
        if [ -f "$keys/$name" ]; then install -m 600 "$keys/$name" "$HOME/.ssh/$name"; fi
    done
    printf 'Host *\n  Port %s\n  IdentityFile %s\n  StrictHostKeyChecking accept-new\n' \
        "$port" "$HOME/.ssh/id" > "$HOME/.ssh/config"
}

serve_ssh() {
    prepare_ssh
    [ -f "$keys/authorized_keys" ] || fail "sshd needs $keys/authorized_keys (MOE_TRAIN_SSH_KEYS names another folder)"
    [ -f "$HOME/.ssh/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/host_key"
    exec /usr/sbin/sshd -D -e -f /dev/null -p "$port" -h "$HOME/.ssh/host_key" \
        -o "AuthorizedKeysFile=$HOME/.ssh/authorized_keys" -o StrictModes=no -o UsePAM=no -o PidFile=none \
        -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o "SetEnv=PATH=$PATH"
}

# Sets nodes, rank, address, port from what the surroundings say.
read_nodes() {
    case $1 in
        srun)
            nodes=$(first SLURM_STEP_NUM_NODES SLURM_JOB_NUM_NODES SLURM_NNODES)
            rank=$(first SLURM_NODEID)
            [ -n "$nodes" ] && [ -n "$rank" ] || fail "srun: SLURM_NODEID is not set; start it by srun"
            [ "$(first SLURM_STEP_NUM_TASKS SLURM_NTASKS)" = "$nodes" ] ||
                fail "srun: one task on each node is needed: srun --ntasks-per-node 1"
            ;;
        *)
            nodes=$(first NUM_NODES PET_NNODES)
            rank=$(first NODE_RANK PET_NODE_RANK RANK)
            ;;
    esac
    address=$(first MASTER_ADDR PET_MASTER_ADDR)
    port=$(first MASTER_PORT PET_MASTER_PORT)
    nodes=${nodes:-1}
}

train() {
    way=$1
    shift
    [ "${1:-}" = train ] || fail "$way starts trainings only: $way train CONFIG ..."
    case $way in
        here) ;;
        deepspeed) set -- "$@" --launcher deepspeed ;;
        *) set -- "$@" --launcher torchrun ;;
    esac
    if [ "$way" = deepspeed ] && [ -n "${MOE_TRAIN_HOSTFILE:-}" ]; then
        prepare_ssh
        set -- "$@" --hostfile "$MOE_TRAIN_HOSTFILE"
    elif [ "$way" != here ]; then
        read_nodes "$way"
        if [ "$nodes" != 1 ]; then
            [ -n "$rank" ] || fail "$nodes nodes, but NODE_RANK does not say which one this is"
            [ -n "$address" ] || fail "$nodes nodes, but MASTER_ADDR does not say where node 0 is"
            set -- "$@" --no-ssh --num-nodes "$nodes" --node-rank "$rank" --master-addr "$address"
            if [ -n "$port" ]; then set -- "$@" --master-port "$port"; fi
        fi
    fi
    if [ -n "${MOE_TRAIN_PROCESSES:-}" ]; then set -- "$@" --processes "$MOE_TRAIN_PROCESSES"; fi
    if [ -n "${MOE_TRAIN_RUN_DIR:-}" ]; then set -- "$@" --run-dir "$MOE_TRAIN_RUN_DIR"; fi
    # These are a node's here, and each worker's where torch reads them.
    unset RANK WORLD_SIZE LOCAL_RANK
    if [ "${MOE_TRAIN_DOCTOR:-1}" != 0 ]; then
        moe-train doctor >&2 || fail "this machine cannot train, see above (MOE_TRAIN_DOCTOR=0 does not look)"
    fi
    say "moe-train $*"
    exec moe-train "$@"
}

[ $# -gt 0 ] || set -- doctor
case $1 in
    deepspeed | torchrun | srun) train "$@" ;;
    train) train here "$@" ;;
    sshd) serve_ssh ;;
    live)
        if [ -z "${MOE_TRAIN_RUN_DIR:-}" ]; then
            say "MOE_TRAIN_RUN_DIR is not set: no run to look at"
            exit 0
        fi
        exec moe-train live "$MOE_TRAIN_RUN_DIR" --max-age "${MOE_TRAIN_LIVE_SECONDS:-60}"
        ;;
    --)
        shift
        exec "$@"
        ;;
    *) exec moe-train "$@" ;;
esac
