// Runs the threads of a block in turns, each on a stack of its own; and memory with guarded ends.
//
// One block at a time, one thread at a time. A thread runs until it must wait for others (a barrier,
// its warp) or ends; then `next` picks who goes on. Threads that never wait share one stack. What a
// kernel does wrong ends the launch with a text. x86-64 and Linux. Not here: what kernels call
// (emulator.h).
#include "emulator.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

// Saves the callee's registers and the stack at *save, takes those at `to`. A launch that ends early
// enters at emulator_return with the launcher's stack. A jump, since processors foresee only returns
// that match a call.
asm(R"(
    .text
    .type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
emulator_return:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rcx
    jmp *%rcx
    .size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** save, void* to) asm("emulator_switch");
extern "C" void emulator_return() asm("emulator_return");

namespace emulator {

Current current;

namespace {

using u32 = unsigned;
using u64 = unsigned long long;

// No thread's number.
const u32 NOBODY = ~0u;
const u64 PAGE = 4096, STACK = 128 * 1024;
// The most dynamic shared memory that any architecture has.
const u32 SHARED = 227 * 1024, SHARED_GUARD = 1024;
// NaN as f32, f16 and bf16.
const unsigned char POISON = 0xff;
// Also NaN as each of them, and told from poison.
const unsigned char GUARD[2] = {0xfe, 0xff};

enum Order : u32 { IN_ORDER, REVERSED, WARP_BY_WARP, RANDOM };
enum State { FRESH, SUSPENDED, RUNNING, IN_WARP, IN_BARRIER, ENDED };

struct Copy {
    void* to;
    const void* from;
    int bytes, group;
};

struct Thread {
    State state;
    uint3 index;
    void* stack;
    // What it waits in.
    const char* what;
    Site site;
    // Copies under way, and the group that the next one belongs to.
    std::vector<Copy> copies;
    int group;
    // Times that it waited for the launches before.
    int awaited;
};

struct Warp {
    u32 lanes;     // how many there are
    u32 runnable;  // lanes that are not waiting
    u32 arrived;
    int first;     // thread that arrived first
    void* brought[32];
};

struct Launch {
    u32 grid[3];
    u32 threads;
    u32 shared;
    u32 order;
    u32 late;
    u64 seed;
    // A barrier or wait that is passed by, null for none.
    const char* passed_file;
    int passed_line;
    void* const* args;
    // At least 1024 bytes for a text, should it fail, and the address that could not be touched.
    char* error;
    u64 error_bytes;
    u64* fault;
};

alignas(1024) unsigned char shared_memory[SHARED + SHARED_GUARD];
const Kernel* kernel_run;
const Launch* launch_run;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<unsigned char*> stacks, all_stacks;  // tops; `stacks` are those that nobody uses
unsigned char* started;                          // the stack on which `work` begins
u32 running, ended, in_barrier;
Site barrier_site;  // of the thread that arrived first
int turn_warp;   // whose turn it is, -1 before the first
u32 turn_lanes;  // lanes that have not run in this turn
void* launcher;  // stack of the launch
bool failed;
pthread_t owner;
u64 random_state;

u64 random_bits() {
    random_state += 0x9e3779b97f4a7c15u;
    u64 z = random_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

const char* short_name(const char* file) {
    const char* slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_site(const Site& a, const Site& b) { return a.line == b.line && same_text(a.file, b.file); }

void report(const char* format, va_list args) {
    uint3 b = current.block;
    u64 room = launch_run->error_bytes;
    int used = std::snprintf(launch_run->error, room, "kernel %s, block (%u, %u, %u)", kernel_run->name, b.x, b.y, b.z);
    if (running != NOBODY) used += std::snprintf(launch_run->error + used, room - used, ", thread %u", running);
    used += std::snprintf(launch_run->error + used, room - used, ": ");
    std::vsnprintf(launch_run->error + used, room - used, format, args);
    failed = true;
}

void tell(const char* format, ...) {
    va_list args;
    va_start(args, format);
    report(format, args);
    va_end(args);
}

void describe(char* text, u64 room, const Thread& thread) {
    if (thread.state == ENDED) {
        std::snprintf(text, room, "has ended");
    } else if (thread.state == IN_BARRIER) {
        std::snprintf(text, room, "waits at the barrier of %s:%d", short_name(thread.site.file), thread.site.line);
    } else {
        std::snprintf(text, room, "waits for its warp in %s of %s:%d", thread.what, short_name(thread.site.file),
                      thread.site.line);
    }
}

// Nobody can go on: names one that waits and one that keeps it waiting.
[[noreturn]] void stuck() {
    u32 waiting = 0, other = 0;
    while (threads[waiting].state == ENDED) waiting++;
    for (u32 i = waiting; i < threads.size(); i++) {
        if (threads[i].state == IN_WARP) {
            waiting = i;
            break;
        }
    }
    State state = threads[waiting].state;
    u32 first = state == IN_WARP ? waiting / 32 * 32 : 0;
    other = first;
    while (other + 1 < threads.size() && threads[other].state == state) other++;
    char one[200], two[200];
    describe(one, sizeof(one), threads[waiting]);
    describe(two, sizeof(two), threads[other]);
    running = waiting;
    if (state == IN_WARP && threads.size() < first + 32) fail("%s, which has only %zu lanes", one, threads.size() - first);
    fail("%s, while thread %u %s", one, other, two);
}

u32 pick_lane(u32 lanes) {
    switch (launch_run->order) {
        case REVERSED: return 31 - __builtin_clz(lanes);
        case RANDOM: {
            u32 at = random_bits() & 31, later = lanes >> at << at;
            return __builtin_ctz(later ? later : lanes);
        }
        default: return __builtin_ctz(lanes);
    }
}

// The warp whose turn is next, -1 if all wait.
int pick_warp() {
    int count = (int)warps.size(), order = (int)launch_run->order;
    bool stays = turn_warp >= 0 && warps[turn_warp].runnable;
    if (stays && (order == REVERSED || order == WARP_BY_WARP)) return turn_warp;
    if (stays && order == RANDOM && random_bits() % 8) return turn_warp;
    int start = order == IN_ORDER ? turn_warp + 1 : order == RANDOM ? (int)(random_bits() % count) : 0;
    for (int i = 0; i < count; i++) {
        int warp = (start + i) % count;
        if (order == REVERSED) warp = count - 1 - warp;
        if (warps[warp].runnable) return warp;
    }
    return -1;
}

// Takes the thread that runs next out of those that can; null if all wait or have ended.
Thread* next() {
    u32 lanes = turn_warp < 0 ? 0 : turn_lanes & warps[turn_warp].runnable;
    if (!lanes) {
        turn_warp = pick_warp();
        if (turn_warp < 0) return nullptr;
        lanes = turn_lanes = warps[turn_warp].runnable;
    }
    u32 lane = pick_lane(lanes);
    turn_lanes &= ~(1u << lane);
    warps[turn_warp].runnable &= ~(1u << lane);
    running = (u32)turn_warp * 32 + lane;
    current.thread = threads[running].index;
    current.lane = (int)lane;
    return &threads[running];
}

unsigned char* take_stack() {
    if (!stacks.empty()) {
        unsigned char* top = stacks.back();
        stacks.pop_back();
        return top;
    }
    void* memory = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a thread's stack");
    mprotect(memory, PAGE, PROT_NONE);
    // Tops at different offsets in their pages, so that they do not share a cache's set.
    all_stacks.push_back((unsigned char*)memory + STACK + PAGE - all_stacks.size() % 61 * 64 * 3);
    return all_stacks.back();
}

// Runs threads from their beginning to their end, as long as fresh ones come next.
void work() {
    unsigned char* mine = started;
    for (;;) {
        threads[running].state = RUNNING;
        kernel_run->run(launch_run->args);
        if (threads[running].awaited != 1) fail("waits %d times for the launches before, not once", threads[running].awaited);
        threads[running].state = ENDED;
        ended++;
        Thread* to = next();
        void* unused;
        if (!to) {
            if (ended < threads.size()) stuck();
            stacks.push_back(mine);
            emulator_switch(&unused, launcher);
        } else if (to->state == SUSPENDED) {
            to->state = RUNNING;
            stacks.push_back(mine);
            emulator_switch(&unused, to->stack);
        }
    }
}

// A stack on which `work` begins.
void* fresh_stack() {
    started = take_stack();
    // As emulator_switch leaves it: six registers, where to go on, and 16-byte alignment behind a call.
    void** frame = (void**)started - 8;
    for (int i = 0; i < 8; i++) frame[i] = nullptr;
    frame[6] = (void*)work;
    return frame;
}

// Leaves the running thread, which waits, to the next one.
void leave() {
    Thread& self = threads[running];
    Thread* to = next();
    if (!to) stuck();
    if (to == &self) {
        self.state = RUNNING;
        return;
    }
    void* stack = to->state == FRESH ? fresh_stack() : to->stack;
    to->state = RUNNING;
    emulator_switch(&self.stack, stack);
}

void land(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

void set_guard(unsigned char* to, u64 bytes) {
    for (u64 i = 0; i < bytes; i++) to[i] = GUARD[i % 2];
}

// Of at most a page.
bool is_guard(const unsigned char* from, u64 bytes) {
    static unsigned char guard[PAGE];
    if (!guard[0]) set_guard(guard, PAGE);
    return std::memcmp(from, guard, bytes) == 0;
}

void start_block() {
    const Kernel& kernel = *kernel_run;
    std::memset(shared_memory, POISON, launch_run->shared);
    if (kernel.shared_start) std::memset(kernel.shared_start, POISON, kernel.shared_end - kernel.shared_start);
    for (Thread& thread : threads) {
        thread.state = FRESH;
        thread.group = 0;
        thread.awaited = 0;
        thread.copies.clear();
    }
    for (Warp& warp : warps) {
        warp.runnable = warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1;
        warp.arrived = 0;
    }
    ended = in_barrier = turn_lanes = 0;
    turn_warp = -1;
}

void run_block(u64 block) {
    const u32* grid = launch_run->grid;
    current.block = {(u32)(block % grid[0]), (u32)(block / grid[0] % grid[1]), (u32)(block / grid[0] / grid[1])};
    start_block();
    next();
    emulator_switch(&launcher, fresh_stack());
    if (failed) return;
    if (!is_guard(shared_memory + launch_run->shared, SHARED_GUARD)) {
        running = NOBODY;
        tell("something was written past the %u bytes of dynamic shared memory", launch_run->shared);
    }
}

void set_up() {
    u32 count = launch_run->threads;
    threads.resize(count);
    warps.resize((count + 31) / 32);
    for (u32 i = 0; i < count; i++) threads[i].index = {i, 0, 0};
    for (u32 i = 0; i < warps.size(); i++) warps[i].lanes = count - 32 * i < 32 ? count - 32 * i : 32;
    const u32* grid = launch_run->grid;
    current.threads = {count, 1, 1};
    current.blocks = {grid[0], grid[1], grid[2]};
    current.shared = shared_memory;
    set_guard(shared_memory + launch_run->shared, SHARED_GUARD);
    random_state = launch_run->seed;
    owner = pthread_self();
    failed = false;
}

void run_blocks() {
    u64 count = (u64)launch_run->grid[0] * launch_run->grid[1] * launch_run->grid[2];
    std::vector<u64> shuffled;
    if (launch_run->order == RANDOM) {
        for (u64 i = 0; i < count; i++) {
            shuffled.push_back(i);
            std::swap(shuffled[i], shuffled[random_bits() % (i + 1)]);
        }
    }
    for (u64 i = 0; i < count && !failed; i++) {
        run_block(launch_run->order == RANDOM ? shuffled[i] : launch_run->order == REVERSED ? count - 1 - i : i);
    }
}

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction before[4];

// A kernel touched what it may not: the launcher goes on with an error.
void on_signal(int signal, siginfo_t* info, void* context) {
    if (!launch_run || !pthread_equal(owner, pthread_self())) {
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        return;
    }
    if (signal == SIGFPE) {
        tell("divides an integer by zero");
    } else if (signal == SIGSEGV && info->si_addr) {
        *launch_run->fault = (u64)info->si_addr;
        tell("touches memory that is not its own");
    } else {
        tell("touches address 0, a wild one, or a vector that is not aligned");
    }
    auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    registers[REG_RSP] = (greg_t)launcher;
    registers[REG_RIP] = (greg_t)emulator_return;
}

// Signals on a stack of their own, since a thread's may be what is full.
struct Signals {
    stack_t stack_before;
    Signals() {
        alignas(16) static unsigned char memory[64 * 1024];
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = sizeof(memory);
        sigaltstack(&stack, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace

void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    report(format, args);
    va_end(args);
    void* unused;
    emulator_switch(&unused, launcher);
    std::abort();
}

// Barriers and waits that kernels have come to.
std::vector<Site> sites;

// Notes a barrier or wait; whether it is to be passed by.
static bool passes(Site site) {
    bool known = false;
    for (const Site& other : sites) known = known || same_site(other, site);
    if (!known) sites.push_back(site);
    return launch_run->passed_file && same_site(site, {launch_run->passed_file, launch_run->passed_line});
}

// Barrier or wait number `i` of those that kernels have come to; 0 where there are no more.
extern "C" int emulator_site(u32 i, const char** file, int* line) {
    if (i >= sites.size()) return 0;
    *file = sites[i].file;
    *line = sites[i].line;
    return 1;
}

void barrier(Site site) {
    if (passes(site)) return;
    Thread& self = threads[running];
    self.site = site;
    self.state = IN_BARRIER;
    if (in_barrier++ == 0) barrier_site = site;
    const Site& first = barrier_site;
    if (!same_site(first, site)) {
        fail("waits at the barrier of %s:%d, while others wait at that of %s:%d", short_name(site.file), site.line,
             short_name(first.file), first.line);
    }
    if (in_barrier == threads.size()) {
        in_barrier = turn_lanes = 0;
        turn_warp = -1;
        for (Thread& thread : threads) thread.state = SUSPENDED;
        for (Warp& warp : warps) warp.runnable = warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1;
    }
    leave();
}

void meet(const char* what, Site site, void* mine, void (*work)(void* const* lanes)) {
    Warp& warp = warps[running / 32];
    Thread& self = threads[running];
    self.what = what;
    self.site = site;
    self.state = IN_WARP;
    warp.brought[running % 32] = mine;
    if (warp.arrived++ == 0) warp.first = (int)running;
    const Thread& first = threads[warp.first];
    if (!same_site(first.site, site) || !same_text(first.what, what)) {
        char text[200];
        describe(text, sizeof(text), first);
        fail("calls %s at %s:%d, while thread %d %s", what, short_name(site.file), site.line, warp.first, text);
    }
    if (warp.arrived == 32) {
        work(warp.brought);
        warp.arrived = turn_lanes = 0;
        for (u32 i = running / 32 * 32, end = i + 32; i < end; i++) threads[i].state = SUSPENDED;
        warp.runnable = ~0u;
    }
    leave();
}

void copy_async(void* to, const void* from, int bytes, Site site) {
    if (((u64)to | (u64)from) % bytes) {
        fail("copies %d bytes from or to an address that is no multiple of it at %s:%d", bytes, short_name(site.file), site.line);
    }
    Thread& self = threads[running];
    Copy copy = {to, from, bytes, self.group};
    if (launch_run->late) self.copies.push_back(copy);
    else land(copy);
}

void commit_copies() { threads[running].group++; }

void await_launches() { threads[running].awaited++; }

void wait_copies(int open, Site site) {
    if (passes(site)) return;
    Thread& self = threads[running];
    std::size_t landed = 0;
    while (landed < self.copies.size() && self.copies[landed].group < self.group - open) land(self.copies[landed++]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + landed);
}

// Runs a kernel; 0, or 1 with a text in `error`. One launch at a time.
extern "C" int emulator_launch(const Kernel* kernel, const Launch* launch) {
    kernel_run = kernel;
    launch_run = launch;
    set_up();
    {
        Signals signals;
        run_blocks();
    }
    // Threads that a failed launch left behind never run again.
    if (failed) stacks = all_stacks;
    launch_run = nullptr;
    return failed;
}

// Memory whose ends are guarded: bytes that are checked up to the page's end, and beyond pages that
// nobody may touch. `map` is what `emulator_free` takes.
struct Memory {
    unsigned char *map, *start;
    u64 map_bytes, bytes;
};

// Takes memory that starts at a multiple of 256 and holds `fill`; 0, or 1 if there is none.
extern "C" int emulator_alloc(Memory* memory, u64 bytes, unsigned char fill) {
    u64 rounded = (bytes + 255) / 256 * 256, inner = (rounded + PAGE - 1) / PAGE * PAGE;
    void* map = mmap(nullptr, inner + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return 1;
    unsigned char* first = (unsigned char*)map + PAGE;
    if (inner && mprotect(first, inner, PROT_READ | PROT_WRITE)) {
        munmap(map, inner + 2 * PAGE);
        return 1;
    }
    unsigned char* start = first + (inner - rounded);
    *memory = {(unsigned char*)map, start, inner + 2 * PAGE, bytes};
    set_guard(first, start - first);
    set_guard(start + bytes, rounded - bytes);
    if (fill) std::memset(start, fill, bytes);
    return 0;
}

extern "C" void emulator_free(const Memory* memory) { munmap(memory->map, memory->map_bytes); }

// Whether nothing was written before and behind the memory.
extern "C" int emulator_intact(const Memory* memory) {
    const unsigned char* first = memory->map + PAGE;
    const unsigned char* end = memory->start + memory->bytes;
    return is_guard(first, memory->start - first) && is_guard(end, memory->map + memory->map_bytes - PAGE - end);
}

}  // namespace emulator
