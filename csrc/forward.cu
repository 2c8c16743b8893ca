// Attention forward for Hopper: O = softmax(scale * Q K^T) V and its log-sum-exp.
//
// FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2. A thread block keeps 64 query rows per consumer warpgroup
// and walks the KV blocks that they see from the last to the first. Roles: of warpgroup 0, the producer, one warp finds
// work items, one thread copies their K and V blocks into two rings, one copies Q, and one may send O away; each other
// warpgroup, a consumer, multiplies and does the softmax of its own rows. Thread blocks are persistent: they take item
// after item (tile/schedule.h), and the producer is already at the next item while the consumers finish this one.
// docs/forward.md has the barriers, the layout of shared memory and the cycle budget.

#include <algorithm>
#include <cmath>
#include <cuda/ptx>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "forward_parts.h"
#include "launch.h"
#include "limits.h"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tensor_map.h"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/product.cuh"
#include "tile/ring.cuh"
#include "tile/schedule.h"
#include "tile/sequences.h"
#include "tile/smem.cuh"
#include "tile/softmax.cuh"
#include "work.h"

namespace flash_attn_ext {
namespace {

// ---------------------------------------------------------------------------------------------------------- config

template <int kRow, class Type, bool kCapped = false, bool kShort = false, bool kIsDivided = false>
struct ForwardConfig {
  using T = Type;
  static constexpr bool kSoftcap = kCapped;
  static constexpr bool kDivided = kIsDivided;  // the call is (work.h); others pay nothing for it
  static constexpr ForwardPlan kPlan = kShort ? kLimits[kRow].short_forward : kLimits[kRow].forward;
  static constexpr int kHeadDim = kLimits[kRow].head_dim;  // that of the tiles, filled up with zeros
  static constexpr int kBlockQ = kPlan.block_q;
  static constexpr int kBlockKv = kPlan.block_kv;
  static constexpr int kStages = kPlan.stages;
  static constexpr int kConsumers = kPlan.consumers();
  static constexpr int kThreads = 128 * (1 + kConsumers);

  // The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: 40 + 2 * 232 = 504, 32 + 3 * 160 = 512,
  // 32 + 4 * 112 = 480. A kernel starts with as many for each thread: with two consumers 168, 504 of the 512, with four
  // 96, 480 of them. The producer's threads need more than 24.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;

  // With a buffer of its own, O leaves while V of the next item arrives. Where it does not fit beside Q, K, V and 4 KB
  // of barriers and items, O leaves through V's, and V waits for it: then the producer sends it, so that consumers are
  // at their next item meanwhile.
  static constexpr bool kOwnOutBuffer =
      (2 * kBlockQ + 2 * kStages * kBlockKv) * kHeadDim * sizeof(T) + 4096 < kSharedMemoryBytes;

  // Where no row of a consumer sees more than kFewColumns of the first block, no more are computed. At head dim 128
  // this was measured to cost more than it saves, since the consumers then fall into step (docs/tuning.md), but in
  // divided calls, whose items are short. These have no registers for it at head dim 64 (C7511).
  static constexpr int kFewColumns = 64;
  static constexpr bool kHasFewColumns = kHeadDim > 128 || (kHeadDim == (kDivided ? 128 : 64) && kBlockKv == 128);

  // Sums of rows are finished under the last P V where registers suffice: elsewhere ptxas serialises the products
  // (C7511).
  static constexpr bool kFinishesEarly = kHeadDim > 128 || !(kHasFewColumns || (kHeadDim == 64 && kBlockKv == 128));

  static constexpr bool kKeepsOffset = kPlan.keeps_offset && !kSoftcap;  // with it consumers need turns
  static constexpr bool kTurns = kPlan.turns || kKeepsOffset;

  static_assert(kPlan.built() && kBlockQ == 64 * kConsumers && kBlockKv % 16 == 0 && kHeadDim % 32 == 0);
  static_assert(kOwnOutBuffer || (kStages >= kConsumers && kBlockKv >= 64), "each consumer's O takes a stage of V");
  static_assert(kConsumers >= 2 && kConsumers <= 4, "register counts are chosen for two to four consumers");
};

// ---------------------------------------------------------------------------------------------------- shared memory

// A work item is a tile of 64 query rows for each consumer, all of one head. The tiles follow each other in the order
// in which Sequences counts them: they are neighbours in a sequence, or belong to several short ones that are packed.
// An item's KV blocks are those that its tiles see, sequence by sequence, each from the last to the first. A consumer
// passes over the blocks of other tiles. In a divided call a tile's rows are those of several heads, and its keys a
// part of the sequence's (work.h).
struct Tile {
  int sequence;
  int rows, keys;  // of the sequence: those that are used
  int stored;      // rows that the sequence has room for
  int first_row;   // in the sequence
  int skipped;     // blocks of the item ahead of the tile's own
  int end_key;     // of those that some of its rows see
  Range blocks;    // its own
  Range full;      // of them, those that need no mask; what rows past the end see is never stored
  bool lost;       // consumer -> scheduler: what was stored is wrong
  bool exact;      // it was lost: no block keeps its offset now
  Origin q, out;
  int64_t first_lse;  // of the sequence's rows, and of the first head
};

template <int kTiles>
struct Item {
  static constexpr int kNone = -1;

  int head;  // kNone: there are no more items. The first one, where heads share tiles
  int kv_head;
  int block_count;
  bool claims_next;  // at its last K the next items are claimed
  bool again;        // it was handed out before, and a tile was lost
  bool has_turns;    // consumers take turns: not where one has all the work, nor where they work on several
                     // sequences, each at another time
  struct Segment {
    Origin kv;
    Range blocks;
  } segments[kTiles];  // the blocks of each sequence
  Tile tiles[kTiles];
  int first_key;  // of the item's part of the keys
};

template <class Config>
struct ForwardSmem {
  static constexpr int kConsumers = Config::kConsumers;
  using QTile = SmemTile<typename Config::T, 64, Config::kHeadDim>;  // of one consumer; O has the same shape
  using KvTile = SmemTile<typename Config::T, Config::kBlockKv, Config::kHeadDim>;
  using KvRing = Ring<Config::kStages>;

  QTile q[kConsumers];
  KvTile k[Config::kStages];
  KvTile v[Config::kStages];
  struct None {};
  struct OutBuffer {
    QTile tile[kConsumers];
  };
  [[no_unique_address]] std::conditional_t<Config::kOwnOutBuffer, OutBuffer, None> out_buffer;

  KvRing k_ring;
  KvRing v_ring;
  Ring<1> q_ring[kConsumers];       // of each consumer; empty: its last Q K^T of the item is done
  static constexpr int kItems = 8;  // those claimed at once, and as many before them, down to those at work
  static_assert(2 * kMostClaims <= kItems && kMostClaims * kConsumers <= 32, "a lane of the scheduler finds a tile");
  using ItemPosition = RingPosition<kItems>;
  using Item = flash_attn_ext::Item<kConsumers>;
  Ring<kItems> item_ring;  // scheduler -> all others; empty: the item is done
  Item items[kItems];
  uint64_t next_items;           // KV loader -> scheduler: the item that claims the next ones has come to its last K
  Ring<1> out_ring[kConsumers];  // consumer -> sender and KV loader; empty: O has left V's stage. An O for each item

  // Without an own buffer, O leaves by the stage that V comes to after so many blocks. For the second consumer it is
  // the one after that, since it is half a block behind. So none waits for the other's last P V.
  __device__ __forceinline__ QTile& out_in_v(int consumer, unsigned v_blocks) {
    return reinterpret_cast<QTile&>(v[(v_blocks + consumer) % Config::kStages]);
  }
  static __device__ __forceinline__ RingPosition<1> out_position(ItemPosition at) {
    static_assert(kItems % 2 == 0);
    return RingPosition<1>::of(at.stage);
  }
};

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;  // + consumer: the one before me has issued its products, the tensor cores are mine
constexpr int kOutBarrier = 5;   // + consumer: my four warps agree on the state of my own O buffer

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  float* lse;          // where keys are shared out: of each part, one after the other
  float* partial_out;  // (part, batch, head, row, column), relative to lse: where keys are shared out
  const float* sinks;  // of each head; null: none
  int* item_counters;  // of claims, of thread blocks that have made their last one, and of items handed out again
  int most_claims;     // at once
  Schedule schedule;
  Sequences sequences;
  Division division;
  int heads, heads_per_kv_head, head_dim;
  float scale_log2;  // with softcap: of the capped scores, which are at most 1
  float cap_log2;    // softmax_scale / softcap * 2 * log2(e)
};

template <class Config>
__device__ __forceinline__ Division division_of(const ForwardArguments& args) {
  return Config::kDivided ? args.division : Division{};
}

// --------------------------------------------------------------------------------------------------------- producer

// One of the tiles of the item with this number, and of which part of the keys.
struct Located {
  Block tile;
  int part;
};
template <class Config>
__device__ __forceinline__ Located locate_tile(const ForwardArguments& args, int number, int consumer) {
  const WorkItem work = args.schedule.item(number);
  const int index = work.block * Config::kConsumers + consumer;
  if (args.sequences.is_packed()) return {args.sequences.locate_packed(index, work.head, 64), 0};
  const Division division = division_of<Config>(args);
  const int sequence = quotient(work.sequence, division.parts);
  return {{sequence, work.head * division.heads, index}, work.sequence - sequence * division.parts};
}

// Whether there are rows in the tile. There are none behind a sequence's last one, and in holes among packed sequences.
template <class Config>
__device__ __forceinline__ bool has_rows(const ForwardArguments& args, const Block& tile) {
  const int stored = args.sequences.stored_rows(tile.sequence);
  return tile.index >= 0 && stored > 0 && tile.index <= (stored - 1) >> division_of<Config>(args).tile_rows_log2;
}

template <class Config>
__device__ __forceinline__ void describe_tile(const ForwardArguments& args, const Located& located, bool is_tile,
                                              Tile& tile) {
  const Sequences& sequences = args.sequences;
  const Block& at = located.tile;
  const Division division = division_of<Config>(args);
  const int rows = 1 << division.tile_rows_log2;
  Sequence sequence = sequences.at(at.sequence);
  if constexpr (Config::kDivided) {
    sequence.keys = min(sequence.keys - located.part * division.part_keys, division.part_keys);
  }
  const int stored = sequences.stored_rows(at.sequence), first_row = is_tile ? at.index * rows : stored;
  tile.sequence = at.sequence;
  tile.rows = sequence.rows;
  tile.keys = sequence.keys;
  tile.stored = stored;
  tile.first_row = first_row;
  ptx::forget_memory();  // what is read again below takes no registers above
  tile.full = sequence.full_blocks(first_row, min(rows, sequence.rows - first_row), Config::kBlockKv);
  ptx::forget_memory();
  tile.blocks = sequence.blocks(first_row, rows, Config::kBlockKv);
  tile.end_key = sequence.seen(first_row, rows).end;
  ptx::forget_memory();
  // An offset is kept behind a key that all rows have seen, the first one too.
  if (Config::kKeepsOffset && tile.full.end < tile.blocks.end &&
      sequence.end_key(first_row) == tile.full.end * Config::kBlockKv) {
    --tile.full.end;
  }
  tile.lost = tile.exact = false;
  ptx::forget_memory();
  tile.q = sequences.origin_of_used(at.sequence);
  tile.out = sequences.origin_of_stored(at.sequence);
  tile.first_lse = located.part * division.part_values + sequences.first_value(at.sequence, at.head, args.heads);
}

// What the tiles make together. Later tiles see blocks that end later: the last one's come first.
template <class Config>
__device__ __forceinline__ void describe_blocks(const ForwardArguments& args,
                                                typename ForwardSmem<Config>::Item& item) {
  int segments = 0, before = 0, sequence = 0, end = 0;  // blocks before the segment at hand, and where that ends
  int seeing = 0;                                       // tiles that see something
#pragma unroll 1
  for (int i = Config::kConsumers - 1; i >= 0; --i) {
    Tile& tile = item.tiles[i];
    if (tile.blocks.begin >= tile.blocks.end) continue;
    ++seeing;
    if (segments == 0 || tile.sequence != sequence) {
      if (segments > 0) before += end - item.segments[segments - 1].blocks.begin;
      sequence = tile.sequence;
      end = tile.blocks.end;
      Origin& kv = item.segments[segments++].kv;
      kv = args.sequences.transposed().origin_of_used(sequence);
      if constexpr (Config::kDivided) kv.row += item.first_key;
    }
    item.segments[segments - 1].blocks = {tile.blocks.begin, end};
    tile.skipped = before + end - tile.blocks.end;
  }
  if (segments == 0) {  // one block for nobody: consumers that see nothing keep step with the loaders
    item.segments[segments++] = {args.sequences.transposed().origin_of_used(item.tiles[0].sequence), {0, 1}};
    end = 1;
  }
  item.block_count = before + end - item.segments[segments - 1].blocks.begin;
  item.has_turns = segments == 1 && seeing > 1;
}

// Waits until the items in so many slots from `at` on are done. Those of which a tile was lost
// (Consumer::say_what_is_lost) are handed out once more, in the first of the slots; none is lost twice.
template <class Config>
__device__ __forceinline__ void free_slots(const ForwardArguments& args, ForwardSmem<Config>& smem,
                                           typename ForwardSmem<Config>::ItemPosition& at, int slots) {
  using Item = typename ForwardSmem<Config>::Item;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int ahead = 0; ahead < slots;) {
    auto done = at;
    done.advance(ahead);
    smem.item_ring.wait_empty(done);
    Item &old = smem.items[done.stage], &item = smem.items[at.stage];
    const bool lost = Config::kKeepsOffset && lane < Config::kConsumers && old.tiles[lane].lost;
    if (!__any_sync(~0u, lost)) {
      ++ahead;
      continue;
    }
    if (ahead > 0) {  // word by word: as an assignment it takes 600 bytes of stack
      auto* const from = reinterpret_cast<const int*>(&old);
      auto* const to = reinterpret_cast<int*>(&item);
#pragma unroll 1
      for (int i = lane; i < static_cast<int>(sizeof(Item) / sizeof(int)); i += 32) to[i] = from[i];
      __syncwarp();
    }
    if (lane < Config::kConsumers) {
      old.tiles[lane].lost = item.tiles[lane].lost = false;
      item.tiles[lane].exact = lost;
    }
    if (lane == 0) {
      item.again = true;
      item.claims_next = false;
      atomicAdd(&args.item_counters[2], 1);
    }
    __syncwarp();
    if (lane == 0) smem.item_ring.end_fill(at);
    at.next();
  }
}

// The scheduler, one warp. The first item is the thread block's own number, the others are claimed when the one before
// has come to its last K: as late as the latency of claiming and finding stays hidden. Where packed sequences are so
// short that it would not, several are claimed at once and each is found by a lane, ahead of the last ones of those
// before; fewer towards the end, so that all thread blocks end together (guided self-scheduling, Polychronopoulos and
// Kuck 1987).
template <class Config>
__device__ __forceinline__ void find_items(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  constexpr int kTiles = Config::kConsumers;
  const int lane = threadIdx.x % 32, claim = lane / kTiles, consumer = lane % kTiles;
  const int items = args.schedule.items();
  typename ForwardSmem<Config>::ItemPosition at;
  uint32_t phase = 0;                    // of next_items
  if constexpr (Config::kKeepsOffset) {  // free_slots looks at slots that have had no item
    static_assert(ForwardSmem<Config>::kItems * kTiles <= 32);
    if (claim < ForwardSmem<Config>::kItems) smem.items[claim].tiles[consumer].lost = false;
    __syncwarp();
  }
  for (int first = blockIdx.x, claims = 1;;) {
    const int number = first + claim;
    const bool is_claimed = claim < claims && number < items;
    const Located located = is_claimed ? locate_tile<Config>(args, number, consumer) : Located{{0, 0, -1}, 0};
    const bool is_tile = is_claimed && has_rows<Config>(args, located.tile);
    const int first_lane = lane - consumer;
    const bool found = __ballot_sync(~0u, is_tile) >> first_lane & ((1u << kTiles) - 1);
    const uint32_t all_found = __ballot_sync(~0u, found && consumer == 0);
    const int count = __popc(all_found), rank = __popc(all_found & ((1u << first_lane) - 1));
    const bool is_end = first >= items;
    free_slots<Config>(args, smem, at, Config::kKeepsOffset && is_end ? ForwardSmem<Config>::kItems : claims);
    if (is_end) break;
    auto own = at;
    own.advance(rank);
    typename ForwardSmem<Config>::Item& item = smem.items[own.stage];
    if (found) {
      describe_tile<Config>(args, located, is_tile, item.tiles[consumer]);
    }
    __syncwarp();
    if (found && consumer == 0) {
      item.head = located.tile.head;
      item.kv_head = quotient(located.tile.head, args.heads_per_kv_head);
      if constexpr (Config::kDivided) item.first_key = located.part * args.division.part_keys;
      item.again = false;
      item.claims_next = rank == count / 4;
      describe_blocks<Config>(args, item);
      smem.item_ring.end_fill(own);
    }
    __syncwarp();
    at.advance(count);
    if (count > 0) {
      wait_phase(&smem.next_items, phase);
      phase ^= 1;
    }

    constexpr int kShares = 4;  // of what is left, for each thread block
    const int thread_blocks = ptx::block_count();
    claims = max(1, min(args.most_claims, quotient(items - first, kShares * thread_blocks)));
    if (lane == 0) first = thread_blocks + atomicAdd(&args.item_counters[0], claims);
    first = __shfl_sync(~0u, first, 0);
  }
  if (lane == 0) {
    smem.items[at.stage].head = ForwardSmem<Config>::Item::kNone;
    smem.item_ring.end_fill(at);
    // Whoever is last sets the counters back for the next launch.
    __threadfence();
    if (atomicAdd(&args.item_counters[1], 1) == static_cast<int>(gridDim.x) - 1) {
      atomicExch(&args.item_counters[0], 0);
      atomicExch(&args.item_counters[1], 0);
    }
  }
}

// K runs one block ahead of V, because the consumers multiply Q K^T of a block before P V of the block before it.
template <class Config>
__device__ __forceinline__ void load_kv(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  RingPosition<Config::kStages> k_at, v_at;
  for (typename Smem::ItemPosition item_at;; item_at.next()) {
    smem.item_ring.wait_full(item_at);
    const typename Smem::Item& item = smem.items[item_at.stage];
    if (item.head == Smem::Item::kNone) break;

    const auto load = [&](typename Smem::KvTile& to, const CUtensorMap& from, int segment, int block, uint64_t* full) {
      load_tile(to, from, item.segments[segment].kv, block * Config::kBlockKv, item.kv_head, full);
    };
    const int count = item.block_count;
    int segment = 0, block = item.segments[0].blocks.end - 1, last_segment = 0, last_block = 0;
    for (int i = 0; i <= count; ++i) {
      if (item.claims_next && i == count - 1) cuda::ptx::mbarrier_arrive(&smem.next_items);
      if (i < count) {
        load(smem.k[k_at.stage], args.k, segment, block, smem.k_ring.begin_fill(k_at, Smem::KvTile::kBytes));
        k_at.next();
      }
      if (i > 0) {
        if constexpr (!Config::kOwnOutBuffer) {
          // Each consumer's O of the item before, ahead of the V that comes to its stage; and all of them ahead of the
          // last V: of each item, or a phase would be missed.
          const int left = i == count ? Config::kConsumers : min(i, Config::kConsumers);
          for (int c = i - 1; c < left; ++c) smem.out_ring[c].wait_empty(Smem::out_position(item_at));
        }
        load(smem.v[v_at.stage], args.v, last_segment, last_block, smem.v_ring.begin_fill(v_at, Smem::KvTile::kBytes));
        v_at.next();
      }
      last_segment = segment;
      last_block = block;
      if (block-- == item.segments[segment].blocks.begin && i + 1 < count) {
        block = item.segments[++segment].blocks.end - 1;
      }
    }
    smem.item_ring.release(item_at);
  }
}

template <class Config>
__device__ __forceinline__ void load_q(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  RingPosition<1> q_at;
  for (typename Smem::ItemPosition item_at;; item_at.next(), q_at.next()) {
    smem.item_ring.wait_full(item_at);
    const typename Smem::Item& item = smem.items[item_at.stage];
    if (item.head == Smem::Item::kNone) break;
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      uint64_t* full = smem.q_ring[consumer].begin_fill(q_at, Smem::QTile::kBytes);
      const Tile& tile = item.tiles[consumer];
      load_tile(smem.q[consumer], args.q, tile.q, tile.first_row, item.head, full);
    }
    smem.item_ring.release(item_at);
  }
}

// Sends O away from where V is. Of a part of the keys the consumers store it themselves.
template <class Config>
__device__ __forceinline__ void send_out(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  const bool is_partial = Config::kDivided && args.partial_out != nullptr;
  unsigned v_blocks = 0;
  for (typename Smem::ItemPosition item_at;; item_at.next()) {
    smem.item_ring.wait_full(item_at);
    const typename Smem::Item& item = smem.items[item_at.stage];
    if (item.head == Smem::Item::kNone) break;
    v_blocks += item.block_count;
    for (int consumer = 0; consumer < Config::kConsumers && !is_partial; ++consumer) {
      const Tile& tile = item.tiles[consumer];
      smem.out_ring[consumer].wait_full(Smem::out_position(item_at));
      // What was sent before is wrong: it must have arrived ahead of this.
      if (Config::kKeepsOffset && item.again) cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});
      store_tile(args.out, smem.out_in_v(consumer, v_blocks), tile.out, tile.first_row, item.head);
      cuda::ptx::cp_async_bulk_commit_group();
      cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
      smem.out_ring[consumer].release(Smem::out_position(item_at));
    }
    smem.item_ring.release(item_at);
  }
}

// --------------------------------------------------------------------------------------------------------- consumer

// A consumer warpgroup's registers and its place in the rings. `scores` is S, then P in float32; `p` is P as operand.
template <class Config>
struct Consumer {
  using T = typename Config::T;
  using Smem = ForwardSmem<Config>;
  static constexpr int kHeadDim = Config::kHeadDim, kBlockKv = Config::kBlockKv;

  const ForwardArguments& args;
  Smem& smem;
  const int index;
  const KMajor<typename Smem::QTile> q;
  const KMajor<typename Smem::KvTile> k;
  const MnMajor<typename Smem::KvTile> v;
  RingPosition<Config::kStages> k_at, v_at;
  int item_count = 0;
  bool has_turns;  // the item at hand

  float out[kHeadDim / 2];
  float scores[kBlockKv / 2];
  uint32_t p[kBlockKv / 16][4];

  __device__ __forceinline__ Consumer(const ForwardArguments& args, Smem& smem, int index)
      : args(args), smem(smem), index(index), q(smem.q[index]), k(smem.k[0]), v(smem.v[0]) {}

  __device__ __forceinline__ Smem::ItemPosition item_at() const { return Smem::ItemPosition::of(item_count); }
  // Q and O: one an item.
  __device__ __forceinline__ RingPosition<1> q_at() const { return RingPosition<1>::of(item_count); }
  __device__ __forceinline__ RingPosition<1> out_at() const { return RingPosition<1>::of(item_count); }

  // The first kColumns columns of the scores.
  template <int kColumns>
  __device__ __forceinline__ auto& first_scores() {
    return reinterpret_cast<float (&)[kColumns / 2]>(scores);
  }

  __device__ __forceinline__ void release_q() { smem.q_ring[index].release(q_at()); }
  __device__ __forceinline__ void release_k() {
    smem.k_ring.release(k_at);
    k_at.next();
  }
  __device__ __forceinline__ void release_v() {
    smem.v_ring.release(v_at);
    v_at.next();
  }

  // Where the config says so, consumers take turns at issuing products, so that one multiplies while another does its
  // softmax. An item of n blocks with turns has n - 1 for each consumer, whether or not it has work in them;
  // one without turns has none for anybody, so that no consumer gets ahead.
  __device__ __forceinline__ void await_turn() {
    if (Config::kTurns && has_turns) ptx::bar_sync(kTurnBarrier + index, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if (Config::kTurns && has_turns) {
      ptx::bar_arrive(kTurnBarrier + (index + 1 == Config::kConsumers ? 0 : index + 1), 256);
    }
  }

  __device__ __forceinline__ const Smem::Item& item() const { return smem.items[item_count % Smem::kItems]; }
  __device__ __forceinline__ const Tile& tile() const { return item().tiles[index]; }

  // Through a shuffle, so that the compiler knows the number, and the loops that depend on it, to be the warp's.
  static __device__ __forceinline__ int same(int number) { return __shfl_sync(~0u, number, 0); }
  static __device__ __forceinline__ Range same(const Range& range) { return {same(range.begin), same(range.end)}; }

  // Of the thread's two rows the r-th: its place among the tile's rows of its head, and that head's among the tile's.
  __device__ __forceinline__ int row_of_head(int r) const {
    const int row = own_row() + 8 * r;
    return Config::kDivided ? row & ((1 << args.division.tile_rows_log2) - 1) : row;
  }
  __device__ __forceinline__ int head_of_tile(int r) const {
    return Config::kDivided ? (own_row() + 8 * r) >> args.division.tile_rows_log2 : 0;
  }

  // Masks the edges that the block has.
  template <int kRegisters>
  __device__ __forceinline__ void mask(float (&part)[kRegisters], int block) {
    // From shared memory again, since no registers are left to keep it.
    const Sequence sequence = {same(tile().rows), same(tile().keys), args.sequences.each.left,
                               args.sequences.each.right};
    const Range full = same(tile().full);
    const int first_row = same(tile().first_row), first_key = block * kBlockKv;
    const int row[2] = {first_row + row_of_head(0), first_row + row_of_head(1)};
    if (block >= full.end) {
      const int end[2] = {sequence.end_key(row[0]) - first_key, sequence.end_key(row[1]) - first_key};
      mask_from(part, end);
    }
    if (block < full.begin) {
      const int first[2] = {sequence.first_key(row[0]) - first_key, sequence.first_key(row[1]) - first_key};
      mask_before(part, first);
    }
  }

  // A block that rows of other consumers see, but none of this one's.
  __device__ __forceinline__ void skip_k(bool takes_turn) {
    smem.k_ring.wait_full(k_at);
    release_k();
    if (takes_turn) {
      await_turn();
      pass_turn();
    }
  }
  __device__ __forceinline__ void skip_v() {
    smem.v_ring.wait_full(v_at);
    release_v();
  }
  __device__ __forceinline__ void skip_block(bool takes_turn) {
    skip_k(takes_turn);
    skip_v();
  }

  // The item's first block has no P V to hide its softmax behind. Of its keys only the first kColumns are seen.
  template <int kColumns>
  __device__ __forceinline__ void first_block(OnlineSoftmax& softmax, int block, bool last) {
    auto& seen = first_scores<kColumns>();
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    product_ss(seen, q, k.at(k_at.stage));
    ptx::wgmma_wait_group<0>(seen);
    release_k();
    if (last) release_q();
    if constexpr (Config::kSoftcap) cap(seen, args.cap_log2);
    mask(seen, block);
    softmax.update(seen, rescale);
#pragma unroll
    for (int i = kColumns / 2; i < kBlockKv / 2; ++i) scores[i] = 0.f;
    to_operand<T>(p, scores);
  }

  // S = Q K^T of this block is issued before O += P V of the one before it: the softmax of S runs under P V. Returns
  // whether P is large in one of the thread's rows, at an offset that stays.
  template <bool kMasked>
  __device__ __forceinline__ bool next_block(OnlineSoftmax& softmax, int block, bool last) {
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    await_turn();
    product_ss(scores, q, k.at(k_at.stage));
    smem.v_ring.wait_full(v_at);
    product_rs(out, p, v.at(v_at.stage), true);
    pass_turn();
    ptx::wgmma_wait_group<1>(scores);
    release_k();
    if (last) release_q();
    if constexpr (Config::kSoftcap) cap(scores, args.cap_log2);
    bool rescales = false, is_large = false;
    if constexpr (kMasked || !Config::kKeepsOffset) {
      if constexpr (kMasked) mask(scores, block);
      rescales = softmax.update(scores, rescale);
    } else {
      is_large = softmax.update_at_offset(scores);
    }
    ptx::wgmma_wait_group<0>(out);
    release_v();
    to_operand<T>(p, scores);
    if (rescales) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[fragment_row(i)];
    }
    return is_large;
  }

  // What rows past the end see does not matter.
  __device__ __forceinline__ void keep_offset(OnlineSoftmax& softmax) {
    const int rows = tile().rows - tile().first_row;
    softmax.keep_offset({row_of_head(0) < rows, row_of_head(1) < rows});
  }

  // Where scores have grown too far for the offset, P was infinite: the tile is to be done again.
  __device__ __forceinline__ void say_what_is_lost(const OnlineSoftmax& softmax) {
    if (softmax.is_lost(0) || softmax.is_lost(1)) smem.items[item_count % Smem::kItems].tiles[index].lost = true;
  }

  // Where P is large in one of the warp's rows, ahead of P V.
  __device__ __forceinline__ void raise_offset(OnlineSoftmax& softmax) {
    float rescale[2];
    softmax.raise_offset(scores, rescale);
    to_operand<T>(p, scores);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[fragment_row(i)];
  }

  // What O is multiplied by at the end, and lse, of the thread's two rows.
  struct Ending {
    float row_scale[2], lse[2];
  };
  __device__ __forceinline__ void finish(OnlineSoftmax& softmax, Ending& ending) {
    const auto sink_log2 = [&](int r) {
      return args.sinks != nullptr ? args.sinks[item().head + head_of_tile(r)] * kLog2E : -INFINITY;
    };
    const float first = sink_log2(0), second = Config::kDivided ? sink_log2(1) : first;
    softmax.finish({first, second}, ending.row_scale, ending.lse);
  }

  __device__ __forceinline__ void last_output(OnlineSoftmax& softmax, Ending& ending) {
    smem.v_ring.wait_full(v_at);
    product_rs(out, p, v.at(v_at.stage), true);
    if constexpr (Config::kFinishesEarly) finish(softmax, ending);
    ptx::wgmma_wait_group<0>(out);
    release_v();
  }

  // O / sum and lse leave. TMA clips the rows past the end.
  __device__ __forceinline__ void store(OnlineSoftmax& softmax, Ending& ending) {
    if constexpr (!Config::kFinishesEarly) finish(softmax, ending);
    const Tile& tile = this->tile();
    const int first_row = same(tile.first_row), row = first_row + row_of_head(0),
              second_row = first_row + row_of_head(1);
    auto& [row_scale, lse] = ending;
    if (first_row + 64 > tile.rows && tile.rows < tile.stored) zero_unused(row, tile.rows, row_scale, lse);
    if (Config::kDivided && args.partial_out != nullptr) {
      store_partial(first_row, row_scale);
    } else {
      store_out(first_row, row_scale);
    }
    float* const row_lse = args.lse + value_of(0, row);
    // From one address: two of them, with the record read again for each, took 150 cycles an item.
    const int64_t to_second = Config::kDivided ? value_of(1, second_row) - value_of(0, row) : 8;
    if (own_column() == 0) {
      if (row < tile.stored) row_lse[0] = lse[0];
      if (second_row < tile.stored) row_lse[to_second] = lse[1];
    }
  }

  // Where the lse of the thread's r-th row stands.
  __device__ __forceinline__ int64_t value_of(int r, int row) const {
    const int64_t of_head = tile().first_lse + row;
    return Config::kDivided ? of_head + int64_t{head_of_tile(r)} * tile().stored : of_head;
  }

  // Through shared memory.
  __device__ __forceinline__ void store_out(int first_row, const float (&row_scale)[2]) {
    if constexpr (Config::kOwnOutBuffer) {
      typename Smem::QTile& buffer = smem.out_buffer.tile[index];
      const bool leader = threadIdx.x % 128 == 0;
      const int head = item().head;
      if (leader) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});  // the item before has left it
      ptx::bar_sync(kOutBarrier + index, 128);
      store_fragment<T, kHeadDim>(buffer, out, row_scale);
      cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
      ptx::bar_sync(kOutBarrier + index, 128);
      if (leader) {
        // What was stored before is wrong: it must have arrived ahead of this.
        if (Config::kKeepsOffset && item().again) cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});
        store_tile(args.out, buffer, tile().out, first_row, head);
        cuda::ptx::cp_async_bulk_commit_group();
      }
    } else {
      auto at = v_at;
      at.advance(index);
      smem.v_ring.wait_empty(at);
      store_fragment<T, kHeadDim>(smem.out_in_v(index, v_at.stage), out, row_scale);
      cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
      __syncwarp();
      if (threadIdx.x % 32 == 0) smem.out_ring[index].end_fill(out_at());
    }
  }

  // Of a part of the keys, in float32 and from registers.
  __device__ __forceinline__ void store_partial(int first_row, const float (&row_scale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + row_of_head(r);
      if (row >= tile().stored) continue;
      float* to = args.partial_out + value_of(r, row) * args.head_dim;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 2) {
        const int column = own_column() + fragment_column(i);
        if (fragment_row(i) != r || column >= args.head_dim) continue;
        *reinterpret_cast<float2*>(to + column) = {out[i] * row_scale[r], out[i + 1] * row_scale[r]};
      }
    }
    if (!Config::kOwnOutBuffer && threadIdx.x % 128 == 0) smem.out_ring[index].release(out_at());
  }

  // Rows that are stored but not used have O 0 and the lse of nothing, whatever their neighbours saw. Divided calls
  // have none.
  __device__ __forceinline__ void zero_unused(int row, int rows, float (&row_scale)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r < rows) continue;
      row_scale[r] = 0.f;
      lse[r] = -INFINITY;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        if (fragment_row(i) == r) out[i] = 0.f;
      }
    }
  }

  // False: there are no more items.
  __device__ __forceinline__ bool run() {
    smem.item_ring.wait_full(item_at());
    if (same(item().head) == Smem::Item::kNone) return false;
    const Range own = same(tile().blocks);
    const bool is_exact = Config::kKeepsOffset && same(tile().exact);  // then each block has its maximum
    const Range full = is_exact ? Range{own.end, own.begin} : same(tile().full);
    const int skipped = same(tile().skipped), count = same(item().block_count);
    const bool sees = own.begin < own.end;
    has_turns = same(item().has_turns);
    OnlineSoftmax softmax(args.scale_log2);
    Ending ending;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;

    smem.q_ring[index].wait_full(q_at());
    // A consumer that sees nothing has a turn less than blocks, as all have.
    // Without an own buffer V may be late, for O's sake: the last one that is passed over is not waited for ahead of
    // the first K that is not, which comes before it.
    for (int i = sees ? skipped : count; i > 0; --i) {
      skip_k(sees || i > 1);
      if (Config::kOwnOutBuffer || !sees || i > 1) skip_v();
    }
    if (sees) {
      int block = own.end - 1;
      const bool few = same(tile().end_key) <= block * kBlockKv + Config::kFewColumns;
      if (Config::kHasFewColumns && few) {
        first_block<Config::kHasFewColumns ? Config::kFewColumns : kBlockKv>(softmax, block, block == own.begin);
      } else {
        first_block<kBlockKv>(softmax, block, block == own.begin);
      }
      if (!Config::kOwnOutBuffer && skipped > 0) skip_v();
      // Masked blocks, those that need no mask, and masked ones again at the window's other edge. As two loops in a
      // third they need more registers than there are (C7511 at head dim 64).
      for (--block; block >= max(full.end, own.begin); --block) {
        next_block<true>(softmax, block, block == own.begin);
      }
      const bool keeps_offset = Config::kKeepsOffset && block >= full.begin;
      if (keeps_offset) keep_offset(softmax);
      while (block >= full.begin) {  // what is rare stands outside the inner loop, which is faster without a branch
        bool large;
        do {
          large = next_block<false>(softmax, block, block == own.begin);
          large = Config::kKeepsOffset && __any_sync(~0u, large);
          --block;
        } while (!large && block >= full.begin);
        if (large) raise_offset(softmax);
      }
      if (keeps_offset) say_what_is_lost(softmax);
      for (; block >= own.begin; --block) next_block<true>(softmax, block, block == own.begin);
      last_output(softmax, ending);
      const int last = same(tile().skipped) + same(tile().blocks.end) - same(tile().blocks.begin);
      for (int i = same(item().block_count) - last; i > 0; --i) skip_block(true);
    } else {
      release_q();
      if constexpr (Config::kFinishesEarly) finish(softmax, ending);
    }
    store(softmax, ending);
    __syncwarp();  // all lanes have read the item
    smem.item_ring.release(item_at());
    ++item_count;
    return true;
  }
};

// ----------------------------------------------------------------------------------------------------------- kernel

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments args) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<ForwardSmem<Config>*>(dynamic_smem);
  // Through a shuffle, so that the compiler knows it is the same for the whole warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    smem.k_ring.init(kConsumerWarps);
    smem.v_ring.init(kConsumerWarps);
    for (auto& ring : smem.q_ring) ring.init(4);
    for (auto& ring : smem.out_ring) ring.init(1, 4);
    smem.item_ring.init(kConsumerWarps + (Config::kOwnOutBuffer ? 2 : 3));  // and those of the producer's that copy
    cuda::ptx::mbarrier_init(&smem.next_items, 1);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    for (const CUtensorMap* map : {&args.q, &args.k, &args.v, &args.out}) ptx::prefetch_tensormap(map);
  }
  __syncthreads();

  if (warpgroup == 0) {
    // The next kernel may begin where thread blocks end. What is above goes beside the end of the kernel before: what
    // that writes is not read ahead of this wait. Consumers need no wait of their own: they touch global memory only
    // after an item has come through it.
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) load_kv<Config>(args, smem);
    if (threadIdx.x == 32) load_q<Config>(args, smem);
    if (threadIdx.x / 32 == 2) find_items<Config>(args, smem);
    if (!Config::kOwnOutBuffer && threadIdx.x == 96) send_out<Config>(args, smem);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config> consumer(args, smem, warpgroup - 1);
    consumer.has_turns = true;
    if (consumer.index == Config::kConsumers - 1) consumer.pass_turn();  // the first turn is consumer 0's
    while (consumer.run()) {
    }
    consumer.has_turns = true;
    if (consumer.index == 0) consumer.await_turn();  // takes the last turn, so that no barrier is left half full
    if (threadIdx.x % 128 == 0) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config>
void launch(const ForwardParams& params, const Division& division, cudaStream_t stream) {
  using Smem = ForwardSmem<Config>;
  const Problem& problem = params.problem;
  const Shape q_shape = problem.q_shape(), k_shape = problem.k_shape();
  const Sequences sequences = problem.sequences();
  const bool q_is_ragged = sequences.is_ragged(), k_is_ragged = sequences.transposed().is_ragged();
  const PartialResults partial(problem, division, params.workspace);
  const bool is_whole = division.parts == 1;

  ForwardArguments args;
  args.division = division;
  args.q = make_sequence_map<typename Smem::QTile>("q", params.q, q_shape, q_is_ragged, division.heads);
  args.k = make_sequence_map<typename Smem::KvTile>("k", params.k, k_shape, k_is_ragged);
  args.v = make_sequence_map<typename Smem::KvTile>("v", params.v, k_shape, k_is_ragged);
  args.out = make_sequence_map<typename Smem::QTile>("out", params.out, q_shape, q_is_ragged, division.heads);
  args.lse = is_whole ? params.lse : partial.lse;
  args.partial_out = partial.out;
  args.sinks = is_whole ? params.sinks : nullptr;
  args.item_counters = params.item_counters;
  args.most_claims = most_claims(problem, Config::kPlan);
  args.sequences = sequences;
  args.heads = static_cast<int>(problem.heads);
  args.heads_per_kv_head = problem.heads_per_kv_head();
  args.head_dim = static_cast<int>(problem.head_dim);
  const auto softcap = static_cast<float>(problem.options.softcap);
  args.scale_log2 = (Config::kSoftcap ? softcap : problem.softmax_scale()) * kLog2E;
  args.cap_log2 = Config::kSoftcap ? problem.softmax_scale() / softcap * 2 * kLog2E : 0.f;
  args.schedule = forward_schedule(problem, Config::kPlan, division);

  constexpr int kBytes = sizeof(Smem);
  const int device = current_device();
  allow_shared_memory<forward_kernel<Config>, kBytes>(device);
  const int blocks = std::min(multiprocessors(device), args.schedule.items());
  launch_overlapped(forward_kernel<Config>, blocks, Config::kThreads, kBytes, stream, args,
                    "launching the forward kernel");
  if (!is_whole) launch_combine(params, division, stream);
}

}  // namespace

void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int multiprocessors = multiprocessors_to_fill();
  const auto launch_plan = [&]<int row, class T, bool kSoftcap, bool kShort>() {
    using Config = ForwardConfig<row, T, kSoftcap, kShort>;
    const Division division = divide(problem, Config::kPlan, multiprocessors);
    if constexpr (!kSoftcap) {
      if (division.is_any()) return launch<ForwardConfig<row, T, kSoftcap, kShort, true>>(params, division, stream);
    }
    launch<Config>(params, division, stream);
  };
  const auto launch_type = [&]<int row, bool kSoftcap, bool kShort = false>() {
    if (problem.dtype == DType::kFloat16) {
      launch_plan.template operator()<row, __half, kSoftcap, kShort>();
    } else {
      launch_plan.template operator()<row, __nv_bfloat16, kSoftcap, kShort>();
    }
  };
  const bool found = with_limits(problem.head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].forward.built()) {
      if constexpr (kLimits[row].short_forward.built()) {
        if (has_short_forward(problem, kLimits[row], multiprocessors)) {  // not with softcap
          return launch_type.template operator()<row, false, true>();
        }
      }
      if (problem.options.softcap == 0) {
        launch_type.template operator()<row, false>();
      } else {
        launch_type.template operator()<row, true>();
      }
    }
  });
  if (!found) throw std::runtime_error("no forward kernel for head_dim " + std::to_string(problem.head_dim));
}

int64_t forward_workspace_bytes(const Problem& problem) {
  const int multiprocessors = multiprocessors_to_fill();
  const Division division = divide(problem, forward_plan(problem, multiprocessors), multiprocessors);
  return PartialResults(problem, division, nullptr).bytes;
}

int forward_shared_memory(int head_dim, bool short_forward) {
  int bytes = 0;
  with_limits(head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].short_forward.built()) {
      if (short_forward) bytes = sizeof(ForwardSmem<ForwardConfig<row, __nv_bfloat16, false, true>>);
    }
    if constexpr (kLimits[row].forward.built()) {
      if (!short_forward) bytes = sizeof(ForwardSmem<ForwardConfig<row, __half>>);
    }
  });
  return bytes;
}

}  // namespace flash_attn_ext
