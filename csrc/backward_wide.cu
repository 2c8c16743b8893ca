// The backward's products for head dims whose dK and dV no warpgroup could hold: the same algorithm as backward.cu's,
// by pairs of thread blocks (clusters of two) that share out the head dim.
//
// A pair takes an item of 128 keys and walks the query blocks that see them, 64 rows a step. Of its two thread blocks
// each has
//   64 of the keys,           for which it computes S, P, dP and dS, over the whole head dim: these are its own keys;
//   half of the head dim,     for which it sums dK and dV of all 128 keys, and dQ: these are its own columns.
// Own keys' P and dS are what the products with own columns need of the other thread block, its peer: each step they go
// to the peer's shared memory, 8 KB each. In a thread block two warpgroups multiply:
//   OwnKeys   S, P, dP and dS of own keys; own columns of their dV and dK, with P^T and dS^T from registers
//   PeerKeys  own columns of the peer's keys' dV and dK, with P^T and dS^T as they arrive in shared memory (P^T, where
//             there are registers for it, as the peer's registers had it); then own columns of dQ, of all keys, which
//             it adds to float32 sums in global memory
// Each accumulates 64 keys x 128 columns of dK and dV in registers. Two warps load, one Q and the other dO. Of both,
// own columns live until dK or dV has been summed; the other columns only until S or dP.
// There are two forms. Persistent pairs take item after item, and one more warp finds the next one meanwhile. In the
// other form a pair has one item. There two more warps see to it that dQ is added to in turn, where it is to be the
// same in every run (backward_turns.cuh): a pair then waits for pairs of lower numbers, which the hardware has started
// before it. docs/backward.md has the order of work, the barriers, the layout of shared memory and the cycle budget.

#include <cuda/ptx>
#include <type_traits>

#include "backward_products.cuh"
#include "backward_turns.cuh"
#include "ptx/cluster.cuh"
#include "ptx/reduce.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy.cuh"
#include "tile/product.cuh"
#include "tile/ring.cuh"
#include "tile/smem.cuh"

namespace flash_attn_ext {
namespace {

constexpr int kWideThreads = 128 * 3;
// The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: together at most 504 for three warpgroups.
constexpr int kLoaderRegisters = 40, kOwnKeysRegisters = 240, kPeerKeysRegisters = 224;

// ---------------------------------------------------------------------------------------------------- shared memory

template <class Config, bool kPersistent>
struct WideSmem {
  using T = typename Config::T;
  static constexpr int kOwnColumns = Config::kHeadDim / 2;
  static constexpr int kStages = Config::kStages;
  static_assert(Config::kDsStages == kStages, "P and dS travel with Q and dO");
  using HalfTile = SmemTile<T, 64, kOwnColumns>;    // 64 rows or keys, half of the head dim
  using DsTile = SmemTile<T, 64, Config::kBlockQ>;  // transposed: a row is a key
  using Stats = RowStats<Config::kBlockQ>;

  // P as a thread holds it, an operand's quad of registers after the other.
  struct Fragments {
    uint4 quads[Config::kBlockQ / 16][128];

    __device__ __forceinline__ void load(uint32_t (&to)[Config::kBlockQ / 16][4]) const {
#pragma unroll
      for (int j = 0; j < Config::kBlockQ / 16; ++j) {
        const uint4 x = ptx::ld_shared_v4(smem_address(&quads[j][threadIdx.x % 128]));
        to[j][0] = x.x, to[j][1] = x.y, to[j][2] = x.z, to[j][3] = x.w;
      }
    }
  };

  // Own keys: own columns, and the others.
  HalfTile k[2], v[2];
  HalfTile peer_k;                     // own columns of the peer's keys, for dQ
  HalfTile q[kStages], dout[kStages];  // own columns
  HalfTile other_q, other_dout;        // the other columns
  DsTile ds[kStages];                  // of own keys; where P travels as a tile, P before dS
  // The peer's P comes as fragments where PeerKeys has registers for them.
  static constexpr bool kSendsFragments = Config::kOwnInRegisters;
  std::conditional_t<kSendsFragments, Fragments, DsTile> peer_p[kStages];
  DsTile peer_ds[kStages];
  // What the next item begins with while this one ends: a place for dV and dK on their way out, in turn of own keys and
  // of the peer's; and own columns of K once more, for dQ, which is behind. Where there is no room, dV and dK leave
  // through V's place and K's, and dQ reads the K that OwnKeys does.
  static constexpr int kTileBytes = (7 + 2 * kStages) * HalfTile::kBytes + 3 * kStages * DsTile::kBytes;
  static constexpr bool kOverlapsItems = kPersistent && kTileBytes + 3 * HalfTile::kBytes + 4096 < kSharedMemoryBytes;
  struct None {};
  struct Overlap {
    HalfTile out[2], dq_k;
  };
  [[no_unique_address]] std::conditional_t<kOverlapsItems, Overlap, None> overlap;
  Stats stats[kStages];
  // The item at hand; of persistent pairs, those before and behind it too, and one more so that numbers are taken
  // modulo 4.
  static constexpr int kItems = kPersistent ? 4 : 1;
  Item items[kItems];
  TurnRing turns;

  Ring<kStages> q_ring;  // with stats
  Ring<kStages> dout_ring;
  Ring<1> other_q_ring, other_dout_ring;
  Ring<1> k_ring, v_ring, dq_k_ring;  // of the item; with dQ's K, or the K of both, the peer's
  uint64_t own_left, peer_left;       // dV and dK of own keys, or of the peer's, have left `overlap.out`
  uint64_t item_found;                // scheduler -> loaders
  uint64_t next_item;                 // loaders of both thread blocks -> scheduler: the item comes to its end
  uint64_t ds_full[kStages];          // own keys' dS is in shared memory
  uint64_t peer_p_full[kStages];      // the peer's P has arrived
  uint64_t peer_ds_full[kStages];     // and its dS
  uint64_t ds_empty[kStages];         // neither here nor at the peer does anybody read what own keys' P and dS left

  // Own columns of own K, as dQ reads them.
  __device__ HalfTile& dq_k() {
    if constexpr (kOverlapsItems) {
      return overlap.dq_k;
    } else {
      return k[0];
    }
  }
};

constexpr int kStoreBarrier = 1;  // + 0, 1: OwnKeys', PeerKeys' warps agree on the state of dK and dV in shared memory

// The other thread block of the pair: where it has what stands at an address here.
struct Peer {
  uint32_t distance;

  __device__ __forceinline__ Peer(const void* here, int rank)
      : distance(ptx::mapa(smem_address(here), rank ^ 1) - smem_address(here)) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t address) const { return address + distance; }
};

// --------------------------------------------------------------------------------------------------------------- walk

// The steps of an item: the query heads one after the other, and of each the same Q blocks, up or down.
struct Walk {
  const Item& item;
  int block, last_block;
  int head = 0;  // counted from the item's first

  __device__ __forceinline__ explicit Walk(const Item& item)
      : item(item), block(uniform(item.first_block)), last_block(uniform(item.last_block)) {}

  __device__ __forceinline__ bool claims_next() const {
    return block == item.claim_block && head + 1 == item.end_head - item.first_head;
  }

  // To the next step; false if there is none.
  __device__ __forceinline__ bool next() {
    if (block != last_block) {
      block += block < last_block ? 1 : -1;
      return true;
    }
    block = uniform(item.first_block);
    return ++head < uniform(item.end_head - item.first_head);
  }

 private:
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // as the compiler sees
};

// ------------------------------------------------------------------------------------------------------------ items

// The scheduler of a persistent pair, one warp of its first thread block. It leaves a record of each item here and at
// the peer. The first item has the pair's own number, the others are claimed: each when the one before comes to its
// end in both thread blocks.
template <class Config>
__device__ __forceinline__ void find_items(const BackwardArguments<Config>& args, WideSmem<Config, true>& smem) {
  constexpr int kItems = WideSmem<Config, true>::kItems;
  const int lane = threadIdx.x % 32;
  const Peer peer(&smem, 0);
  int number = blockIdx.x / 2;
  for (int count = 0;; ++count) {
    Item& item = smem.items[count % kItems];
    while (number < args.schedule.items() && !find_item<Config>(args, number, item)) number = claim_item(args);
    const bool found = number < args.schedule.items();
    if (!found) item.first_head = Item::kNone;
    __syncwarp();
    if (lane < sizeof(Item) / sizeof(uint4)) {
      const uint32_t from = smem_address(&item) + lane * sizeof(uint4);
      ptx::st_async_v4(peer(from), ptx::ld_shared_v4(from), peer(smem_address(&smem.item_found)));
    }
    if (lane == 0) cuda::ptx::mbarrier_arrive(&smem.item_found);
    if (!found) break;
    wait_phase(&smem.next_item, count % 2);
    number = claim_item(args);
  }
}

// Calls f with each of the pair's items and how many there were before it, once await(count) has returned.
template <class Config, bool kPersistent, class Await, class F>
__device__ __forceinline__ void for_each_item(WideSmem<Config, kPersistent>& smem, Await&& await, F&& f) {
  for (int count = 0;; ++count) {
    await(count);
    const Item& item = smem.items[count % smem.kItems];
    if (kPersistent && item.first_head == Item::kNone) break;
    f(item, count);
    if constexpr (!kPersistent) break;
  }
}

// ------------------------------------------------------------------------------------------------------------ loaders

// One of two warps: the first loads own keys' K and the peer's, then Q with its stats; the second V, then dO. Of each
// step the other columns come first: they have one stage, and S and dP begin with them.
template <bool kLoadsQ, class Config, bool kPersistent>
__device__ __forceinline__ void load(const BackwardArguments<Config>& args, WideSmem<Config, kPersistent>& smem,
                                     int rank) {
  using Smem = WideSmem<Config, kPersistent>;
  using HalfTile = typename Smem::HalfTile;
  using Stats = typename Smem::Stats;
  const bool leads = threadIdx.x % 32 == 0;
  const int own_column = rank * Smem::kOwnColumns, other_column = Smem::kOwnColumns - own_column;

  Ring<1>& key_ring = kLoadsQ ? smem.k_ring : smem.v_ring;
  HalfTile(&key_tiles)[2] = kLoadsQ ? smem.k : smem.v;
  const CUtensorMap& key_map = kLoadsQ ? args.k : args.v;
  Ring<1>& other_ring = kLoadsQ ? smem.other_q_ring : smem.other_dout_ring;
  Ring<Smem::kStages>& ring = kLoadsQ ? smem.q_ring : smem.dout_ring;
  HalfTile& other_tile = kLoadsQ ? smem.other_q : smem.other_dout;
  HalfTile(&tiles)[Smem::kStages] = kLoadsQ ? smem.q : smem.dout;
  const CUtensorMap& map = kLoadsQ ? args.q : args.dout;
  const bool in_turn = kLoadsQ && !kPersistent && args.turns != nullptr;
  const uint32_t next_item = ptx::mapa(smem_address(&smem.next_item), 0);  // where the scheduler is

  RingPosition<1> other_at;
  RingPosition<Smem::kStages> at;
  TurnRing::Position turn_at;
  bool prepared = false;
  for (int count = 0;; ++count) {
    if constexpr (kPersistent) {
      if (kLoadsQ && leads && rank == 1) expect_bytes(&smem.item_found, sizeof(Item));
      wait_phase(&smem.item_found, count % 2);
    }
    const Item& item = smem.items[count % Smem::kItems];
    const RingPosition<1> item_at = {0, count % 2u};
    key_ring.wait_empty(item_at);
    if (kPersistent && item.first_head == Item::kNone) {
      if constexpr (kLoadsQ) {
        if (leads) key_ring.end_fill(item_at);
      } else if constexpr (Smem::kOverlapsItems) {  // PeerKeys looks for items here
        ring.wait_empty(at);
        if (leads) ring.end_fill(at);
      }
      break;
    }
    const int own_key = item.first_key + 64 * rank, peer_key = own_key ^ 64;
    constexpr bool kLoadsPeerK = kLoadsQ && !Smem::kOverlapsItems;
    if (leads) {
      uint64_t* full = key_ring.begin_fill(item_at, (kLoadsPeerK ? 3 : 2) * HalfTile::kBytes);
      load_tile(key_tiles[1], key_map, item.kv, own_key, item.kv_head, full, other_column);
      load_tile(key_tiles[0], key_map, item.kv, own_key, item.kv_head, full, own_column);
      if (kLoadsPeerK) load_tile(smem.peer_k, args.k, item.kv, peer_key, item.kv_head, full, own_column);
    }
    __syncwarp();
    bool loads_dq_k = kLoadsQ && Smem::kOverlapsItems;

    Walk walk(item);
    do {
      const int row = walk.block * Config::kBlockQ, head = item.first_head + walk.head;
      const int q_block = item.first_q_block + walk.head * item.head_blocks + walk.block;
      if constexpr (kPersistent) {
        const bool claims = walk.claims_next();
        if (leads && claims) ptx::mbarrier_arrive_remote(next_item);
      }
      other_ring.wait_empty(other_at);
      if (leads) {
        uint64_t* full = other_ring.begin_fill(other_at, HalfTile::kBytes);
        load_tile(other_tile, map, item.q, row, head, full, other_column);
      }
      ring.wait_empty(at);
      if (leads) {
        uint64_t* full = ring.begin_fill(at, HalfTile::kBytes + (kLoadsQ ? sizeof(Stats) : 0));
        load_tile(tiles[at.stage], map, item.q, row, head, full, own_column);
        if constexpr (kLoadsQ) {
          if (!prepared) cudaGridDependencySynchronize();  // `prepare` has left the stats
          prepared = true;
          cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, &smem.stats[at.stage],
                                   args.stats + q_block, sizeof(Stats), full);
        }
        constexpr int kOnlyItem = 0;
        if (in_turn) smem.turns.put(turn_at, Workspace<Config>::kTurns * q_block + rank, walk.block, kOnlyItem);
      }
      __syncwarp();
      if constexpr (kLoadsQ && Smem::kOverlapsItems) {
        if (loads_dq_k) {  // behind the first Q: dQ may still read the K of the item before
          loads_dq_k = false;
          smem.dq_k_ring.wait_empty(item_at);
          if (leads) {
            uint64_t* full = smem.dq_k_ring.begin_fill(item_at, 2 * HalfTile::kBytes);
            load_tile(smem.overlap.dq_k, args.k, item.kv, own_key, item.kv_head, full, own_column);
            load_tile(smem.peer_k, args.k, item.kv, peer_key, item.kv_head, full, own_column);
          }
          __syncwarp();
        }
      }
      other_at.next();
      at.next();
      turn_at.next();
    } while (walk.next());
    if constexpr (!kPersistent) break;
  }
  if (in_turn && leads) smem.turns.put_end(turn_at);
}

// ----------------------------------------------------------------------------------------------------- dK and dV leave

// Own columns of dK and dV of 64 keys, which are half `half` of the item's: as 16-bit gradients through shared memory
// by TMA, which clips the keys past the end, or, where other items share the KV head, as float32 sums. When all of the
// warpgroup's warps return, nobody reads what is at `out`.
template <class Config, class HalfTile>
__device__ __forceinline__ void store_keys(const BackwardArguments<Config>& args, const Item& item, HalfTile (&out)[2],
                                           const float (&dk)[Config::kHeadDim / 4],
                                           const float (&dv)[Config::kHeadDim / 4], int rank, int half) {
  using T = typename Config::T;
  constexpr int kOwnColumns = HalfTile::kColumns;
  if (!item.complete) {
    const KvSums& sums = item.coarse ? args.coarse_sums : args.fine_sums;
    const int first_patch = half * (Config::kHeadDim / 8) + rank * (kOwnColumns / 8);
    if (args.needs_dv) write_sums<Config>(dv, sums.dv, item, first_patch);
    if (args.needs_dk) write_sums<Config>(dk, sums.dk, item, first_patch);
    return;
  }
  const float dk_scale[2] = {args.scale, args.scale}, dv_scale[2] = {1.f, 1.f};
  const int barrier = half == rank ? kStoreBarrier : kStoreBarrier + 1;
  ptx::bar_sync(barrier, 128);  // the warpgroup's products have read what stood there
  store_fragment<T, kOwnColumns>(out[0], dv, dv_scale);
  store_fragment<T, kOwnColumns>(out[1], dk, dk_scale);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  ptx::bar_sync(barrier, 128);
  if (threadIdx.x % 128 == 0) {
    const int row = item.first_key + 64 * half, column = rank * kOwnColumns;
    if (args.needs_dv) store_tile(args.dv, out[0], item.out, row, item.kv_head, column);
    if (args.needs_dk) store_tile(args.dk, out[1], item.out, row, item.kv_head, column);
    cuda::ptx::cp_async_bulk_commit_group();
    cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  }
  __syncwarp();
}

// ----------------------------------------------------------------------------------------------------------- own keys

template <class Config, bool kPersistent>
struct OwnKeys {
  using T = typename Config::T;
  using Smem = WideSmem<Config, kPersistent>;
  using HalfTile = typename Smem::HalfTile;
  static constexpr int kBlockQ = Config::kBlockQ, kOwnColumns = Smem::kOwnColumns, kStages = Smem::kStages;
  static constexpr uint32_t kWarpBytes = 16 * Smem::DsTile::kRowBytes;  // of a warp's rows of P or dS
  using Operand = uint32_t[kBlockQ / 16][4];

  const BackwardArguments<Config>& args;
  Smem& smem;
  const int rank;
  const Peer peer;
  const KMajor<HalfTile> columns;
  const MnMajor<HalfTile> rows;
  RingPosition<kStages> at;  // of the step at hand. Its stage is the phase of the rings of one stage
  int diagonal[2];
  float dk[kOwnColumns / 2], dv[kOwnColumns / 2];
  Operand p, sloped_p;  // sloped_p: with softcap
  // Of K and V, own columns, where there is room: the left operands of their part of S and dP.
  static constexpr bool kInRegisters = Config::kOwnInRegisters;
  uint32_t k_operand[kInRegisters ? kOwnColumns / 16 : 1][4], v_operand[kInRegisters ? kOwnColumns / 16 : 1][4];

  __device__ __forceinline__ OwnKeys(const BackwardArguments<Config>& args, Smem& smem, int rank)
      : args(args),
        smem(smem),
        rank(rank),
        peer(&smem, rank),
        columns(smem.k[0], kBitsInCluster),
        rows(smem.k[0], 0, kBitsInCluster) {
    static_assert(kStages == 2);
  }

  // Operands that sum over the head dim, for S and dP; over queries, for dK and dV.
  __device__ __forceinline__ KMajor<HalfTile> over_columns(const HalfTile& tile) const {
    const KMajor<HalfTile> operand = columns.of(tile, smem.k[0]);
    return Config::kSoftcap ? operand.anew() : operand;
  }
  __device__ __forceinline__ MnMajor<HalfTile> over_rows(const HalfTile& tile) const {
    return rows.of(tile, smem.k[0]);
  }

  __device__ __forceinline__ RingPosition<1> other_at(RingPosition<kStages> at) const {
    return {0, static_cast<uint32_t>(at.stage)};
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[kBlockQ / 2], RingPosition<kStages> at) {
    smem.other_q_ring.wait_full(other_at(at));
    product_ss(scores, over_columns(smem.k[1]), over_columns(smem.other_q));
    smem.q_ring.wait_full(at);
    if constexpr (kInRegisters) {
      product_rs(scores, k_operand, over_columns(smem.q[0]).at(at.stage), true);
    } else {
      product_ss(scores, over_columns(smem.k[0]), over_columns(smem.q[0]).at(at.stage), true);
    }
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kBlockQ / 2]) {
    smem.other_dout_ring.wait_full(other_at(at));
    product_ss(dp, over_columns(smem.v[1]), over_columns(smem.other_dout));
    smem.dout_ring.wait_full(at);
    if constexpr (kInRegisters) {
      product_rs(dp, v_operand, over_columns(smem.dout[0]).at(at.stage), true);
    } else {
      product_ss(dp, over_columns(smem.v[0]), over_columns(smem.dout[0]).at(at.stage), true);
    }
  }

  // P of the step at hand, in registers, and in shared memory where it travels as a tile.
  __device__ __forceinline__ void make_p(float (&scores)[kBlockQ / 2], const float2 (&lse_log2)[kBlockQ / 8],
                                         const Walk& walk) {
    if constexpr (Config::kSoftcap) cap(scores, args.cap_log2);
    const Range whole = walk.item.ranges[2 + rank];
    if (walk.block < whole.begin || walk.block >= whole.end) [[unlikely]] {
      mask_queries(scores, diagonal, args.reach, walk.block * kBlockQ, walk.item.rows);
    }
    if constexpr (Config::kSoftcap) {
      exponentiate_capped<T>(p, sloped_p, scores, args.scale_log2, lse_log2);
    } else {
      exponentiate(scores, args.scale_log2, lse_log2);
      to_operand<T>(p, scores);
    }
    wait_phase(&smem.ds_empty[at.stage], at.phase ^ 1);
    if constexpr (!Smem::kSendsFragments) store_ds(p);
    __syncwarp();
  }

  __device__ __forceinline__ void store_ds(const Operand& x) {
    const uint32_t address = own_columns_address(smem.ds[at.stage]);
#pragma unroll
    for (int j = 0; j < kBlockQ / 16; ++j) store_columns<typename Smem::DsTile>(address, j, x[j]);
  }

  // P goes to the peer: fragments from the registers from which dV's product reads it too; a tile from where dS will
  // be, so that it is read before.
  __device__ __forceinline__ void send_p() {
    const uint32_t full = peer(smem_address(&smem.peer_p_full[at.stage]));
    if constexpr (Smem::kSendsFragments) {
      const uint32_t to = peer(smem_address(&smem.peer_p[at.stage].quads[0][threadIdx.x % 128]));
#pragma unroll
      for (int j = 0; j < kBlockQ / 16; ++j) {
        ptx::st_async_v4(to + j * sizeof smem.peer_p[0].quads[0], {p[j][0], p[j][1], p[j][2], p[j][3]}, full);
      }
    } else {
      const uint32_t offset = threadIdx.x / 32 % 4 * kWarpBytes + threadIdx.x % 32 * sizeof(uint4);
      const uint32_t from = smem_address(smem.ds[at.stage].data) + offset;
      const uint32_t to = peer(smem_address(&smem.peer_p[at.stage]) + offset);
#pragma unroll
      for (int i = 0; i < kWarpBytes / 512; ++i)
        ptx::st_async_v4(to + 512 * i, ptx::ld_shared_v4(from + 512 * i), full);
    }
    __syncwarp();
  }

  // dS goes to PeerKeys here and there.
  __device__ __forceinline__ void send_ds() {
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      cuda::ptx::mbarrier_arrive(&smem.ds_full[at.stage]);
      const uint32_t offset = threadIdx.x / 32 % 4 * kWarpBytes;
      ptx::cp_async_bulk_remote(peer(smem_address(smem.peer_ds[at.stage].data) + offset),
                                smem_address(smem.ds[at.stage].data) + offset, kWarpBytes,
                                peer(smem_address(&smem.peer_ds_full[at.stage])));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run(const Item& item, int count) {
    const RingPosition<1> item_at = {0, count % 2u};
    Walk walk(item);
    bool accumulate = false;  // not in the first step
    find_diagonal(diagonal, item, item.first_key + 64 * rank);
    if constexpr (kInRegisters) load_operand(k_operand, smem.k[0]);
    {
      float scores[kBlockQ / 2];
      float2 lse_log2[kBlockQ / 8];
      issue_scores(scores, at);
      load_queries(lse_log2, smem.stats[at.stage].lse_log2);
      ptx::wgmma_wait_group<0>(scores);
      smem.other_q_ring.release({});
      make_p(scores, lse_log2, walk);
    }
    smem.v_ring.wait_full(item_at);
    if constexpr (kInRegisters) load_operand(v_operand, smem.v[0]);
    for (;;) {
      Operand ds;
      {
        float dp[kBlockQ / 2];
        float2 delta[kBlockQ / 8];
        issue_dp(dp);
        product_rs(dv, p, over_rows(smem.dout[0]).at(at.stage), accumulate);
        if constexpr (!Smem::kSendsFragments) send_p();
        if constexpr (!Config::kSoftcap) load_queries(delta, smem.stats[at.stage].delta);
        if constexpr (Smem::kSendsFragments) send_p();  // behind these loads, which it would hold up
        ptx::wgmma_wait_group<0>(dp, dv);
        if constexpr (Config::kSoftcap) load_queries(delta, smem.stats[at.stage].delta);  // earlier, and ptxas spills
        smem.other_dout_ring.release({});
        smem.dout_ring.release(at);
        const Operand& of_ds = Config::kSoftcap ? sloped_p : p;
        subtract_delta<T>(ds, [&](int i) { return unpack<T>(of_ds[i / 8][i % 8 / 2]); }, dp, delta);
        store_ds(ds);
      }
      product_rs(dk, ds, over_rows(smem.q[0]).at(at.stage), accumulate);
      send_ds();
      accumulate = true;
      const RingPosition<kStages> done = at;
      at.next();
      if (!walk.next()) {
        ptx::wgmma_wait_group<0>(dk);
        smem.q_ring.release(done);
        break;
      }
      float scores[kBlockQ / 2];
      float2 lse_log2[kBlockQ / 8];
      issue_scores(scores, at);
      load_queries(lse_log2, smem.stats[at.stage].lse_log2);
      ptx::wgmma_wait_group<0>(scores, dk);
      smem.other_q_ring.release({});
      smem.q_ring.release(done);
      make_p(scores, lse_log2, walk);
    }
    if constexpr (Smem::kOverlapsItems) {
      smem.k_ring.release(item_at);
      smem.v_ring.release(item_at);
      wait_phase(&smem.peer_left, item_at.phase ^ 1);
      store_keys(args, item, smem.overlap.out, dk, dv, rank, rank);
      if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&smem.own_left);
      __syncwarp();
    } else {
      store_keys(args, item, smem.v, dk, dv, rank, rank);
      smem.v_ring.release(item_at);
    }
  }
};

// ---------------------------------------------------------------------------------------------- the peer's keys and dQ

template <class Config, bool kPersistent>
__device__ __forceinline__ void sum_peer_keys(const BackwardArguments<Config>& args,
                                              WideSmem<Config, kPersistent>& smem, int rank) {
  using Smem = WideSmem<Config, kPersistent>;
  using HalfTile = typename Smem::HalfTile;
  using DsTile = typename Smem::DsTile;
  constexpr int kOwnColumns = Smem::kOwnColumns, kQPatches = Workspace<Config>::kQPatches;
  constexpr int kColumns[2] = {64, kOwnColumns - 64};  // of dQ, one part after the other
  const Peer peer(&smem, rank);
  const KMajor<DsTile> peer_ds(smem.peer_ds[0], kBitsInCluster);
  const MnMajor<DsTile> ds_rows(smem.ds[0], 0, kBitsInCluster), peer_ds_rows(smem.peer_ds[0], 0, kBitsInCluster);
  const MnMajor<HalfTile> q(smem.q[0], 0, kBitsInCluster), dout(smem.dout[0], 0, kBitsInCluster);
  constexpr int kSlab = 64 / HalfTile::kSlabColumns;  // the second part's first
  const MnMajor<HalfTile> k[2] = {MnMajor<HalfTile>(smem.dq_k(), 0, kBitsInCluster),
                                  MnMajor<HalfTile>(smem.dq_k(), kSlab, kBitsInCluster)};
  const MnMajor<HalfTile> peer_k[2] = {MnMajor<HalfTile>(smem.peer_k, 0, kBitsInCluster),
                                       MnMajor<HalfTile>(smem.peer_k, kSlab, kBitsInCluster)};
  const bool leads = threadIdx.x % 32 == 0;
  float dk[kOwnColumns / 2], dv[kOwnColumns / 2];

  // Neither P nor dS arrives before its barrier expects it: the peer waits for `ds_empty`, which is told after this.
  const auto expect_peer = [&](int stage) {
    if (threadIdx.x % 128 == 0) {
      expect_bytes(&smem.peer_p_full[stage], DsTile::kBytes);
      expect_bytes(&smem.peer_ds_full[stage], DsTile::kBytes);
    }
    __syncwarp();
  };

  RingPosition<Smem::kStages> at;
  const bool needs_dq = args.dq_sums != nullptr;
  const bool in_turn = !kPersistent && args.turns != nullptr;
  TurnRing::Position turn_at;
  const auto await_item = [&](int count) {
    if constexpr (Smem::kOverlapsItems) {
      smem.dout_ring.wait_full(at);  // its K is needed later
    } else {
      smem.k_ring.wait_full({0, count % 2u});
    }
  };
  for_each_item(smem, await_item, [&](const Item& item, int count) {
    const RingPosition<1> item_at = {0, count % 2u};
    Walk walk(item);
    SumPatch* const first_sums = args.dq_sums + int64_t{item.first_q_block} * kQPatches + rank * (kOwnColumns / 8);
    const int64_t head_patches = int64_t{item.head_blocks} * kQPatches;
    bool accumulate = false;
    do {
      smem.dout_ring.wait_full(at);
      wait_phase(&smem.peer_p_full[at.stage], at.phase);
      uint32_t p[Config::kBlockQ / 16][4];
      if constexpr (Smem::kSendsFragments) {
        smem.peer_p[at.stage].load(p);
        product_rs(dv, p, dout.at(at.stage), accumulate);
      } else {
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);  // P came by ordinary stores
        const KMajor<DsTile> peer_p(smem.peer_p[0], kBitsInCluster);
        product_ss(dv, peer_p.at(at.stage), dout.at(at.stage), accumulate);
      }
      smem.q_ring.wait_full(at);
      wait_phase(&smem.peer_ds_full[at.stage], at.phase);
      expect_peer(at.stage);
      product_ss(dk, peer_ds.at(at.stage), q.at(at.stage), accumulate);
      if constexpr (Smem::kOverlapsItems) {
        if (!accumulate) smem.dq_k_ring.wait_full(item_at);
      }
      accumulate = true;

      float first_dq[kColumns[0] / 2], second_dq[kColumns[1] / 2];
      product_ss(first_dq, peer_ds_rows.at(at.stage), peer_k[0]);
      wait_phase(&smem.ds_full[at.stage], at.phase);
      product_ss(first_dq, ds_rows.at(at.stage), k[0], true);
      product_ss(second_dq, peer_ds_rows.at(at.stage), peer_k[1]);
      product_ss(second_dq, ds_rows.at(at.stage), k[1], true);
      ptx::wgmma_wait_group<5>(dv);
      smem.dout_ring.release(at);
      ptx::wgmma_wait_group<4>(dk);
      smem.q_ring.release(at);

      SumPatch* const sums = first_sums + walk.head * head_patches + walk.block * kQPatches;
      const auto add = [&]<int kRegisters>(SumPatch* to, const float (&dq)[kRegisters]) {
        if (!needs_dq) return;
#pragma unroll
        for (int i = 0; i < kRegisters; i += 4) {
          ptx::red_add_v4(&to[i / 4].quad[threadIdx.x % 128].x, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
        }
      };
      ptx::wgmma_wait_group<2>(first_dq);
      if (in_turn) smem.turns.wait(turn_at);
      add(sums, first_dq);
      ptx::wgmma_wait_group<0>(second_dq);
      if (leads) {
        cuda::ptx::mbarrier_arrive(&smem.ds_empty[at.stage]);
        ptx::mbarrier_arrive_remote(peer(smem_address(&smem.ds_empty[at.stage])));
      }
      __syncwarp();
      add(sums + kColumns[0] / 8, second_dq);
      if (in_turn) {
        smem.turns.finish(turn_at);
        turn_at.next();
      }
      at.next();
    } while (walk.next());
    if constexpr (Smem::kOverlapsItems) {
      smem.dq_k_ring.release(item_at);
      wait_phase(&smem.own_left, item_at.phase);
      store_keys(args, item, smem.overlap.out, dk, dv, rank, 1 - rank);
      if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&smem.peer_left);
      __syncwarp();
    } else {
      store_keys(args, item, smem.k, dk, dv, rank, 1 - rank);
      smem.k_ring.release(item_at);
    }
  });
  // Until the peer has told that it has read the last of what went to it, it may still arrive at a barrier here.
  for (int i = 0; i < Smem::kStages; ++i, at.next()) wait_phase(&smem.ds_empty[at.stage], at.phase ^ 1);
}

// ----------------------------------------------------------------------------------------------------------- kernel

template <class Config, bool kPersistent>
__cluster_dims__(2, 1, 1) __global__ void __launch_bounds__(kWideThreads, 1)
    backward_wide_kernel(const __grid_constant__ BackwardArguments<Config> args) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  using Smem = WideSmem<Config, kPersistent>;
  auto& smem = *reinterpret_cast<Smem*>(dynamic_smem);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int rank = blockIdx.x % 2;
  cudaTriggerProgrammaticLaunchCompletion();

  if (warp == 0) {
    if constexpr (!kPersistent) {
      const bool found = find_item<Config>(args, blockIdx.x / 2, smem.items[0]);
      if (!found) smem.items[0].first_head = Item::kNone;
    }
  } else if (threadIdx.x == 32) {
    constexpr int kWarps = 4;  // of OwnKeys; of PeerKeys as well
    smem.q_ring.init(2 * kWarps);
    smem.dout_ring.init(2 * kWarps);
    smem.other_q_ring.init(kWarps);
    smem.other_dout_ring.init(kWarps);
    smem.turns.init();
    smem.k_ring.init(kWarps);
    smem.v_ring.init(kWarps);
    smem.dq_k_ring.init(kWarps);
    cuda::ptx::mbarrier_init(&smem.own_left, kWarps);
    cuda::ptx::mbarrier_init(&smem.peer_left, kWarps);
    cuda::ptx::mbarrier_init(&smem.item_found, 1);
    cuda::ptx::mbarrier_init(&smem.next_item, 4);
    for (int i = 0; i < Smem::kStages; ++i) {
      cuda::ptx::mbarrier_init(&smem.ds_full[i], kWarps);
      cuda::ptx::mbarrier_init(&smem.peer_p_full[i], 1);
      cuda::ptx::mbarrier_init(&smem.peer_ds_full[i], 1);
      cuda::ptx::mbarrier_init(&smem.ds_empty[i], 2 * kWarps);  // of PeerKeys here and there
    }
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    for (int i = 0; i < Smem::kStages; ++i) {
      expect_bytes(&smem.peer_p_full[i], Smem::DsTile::kBytes);
      expect_bytes(&smem.peer_ds_full[i], Smem::DsTile::kBytes);
    }
  }
  __syncwarp();
  ptx::cluster_sync();
  if constexpr (!kPersistent) {
    if (smem.items[0].first_head == Item::kNone) return;  // a hole among the blocks of packed sequences, for both
  }
  if (warp < 4) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    if (warp == 0) load<true>(args, smem, rank);
    if (warp == 1) load<false>(args, smem, rank);
    if constexpr (kPersistent) {
      if (warp == 2 && rank == 0) find_items(args, smem);
    } else if (args.turns != nullptr) {
      if (threadIdx.x == 2 * 32) grant_turns(args, smem.turns, smem.items);
      if (threadIdx.x == 3 * 32) announce_turns(args, smem.turns);
    }
  } else if (warp < 8) {
    ptx::setmaxnreg_inc<kOwnKeysRegisters>();
    OwnKeys<Config, kPersistent> own_keys(args, smem, rank);
    const auto await_item = [&](int count) { smem.k_ring.wait_full({0, count % 2u}); };
    for_each_item(smem, await_item, [&](const Item& item, int count) { own_keys.run(item, count); });
  } else {
    ptx::setmaxnreg_inc<kPeerKeysRegisters>();
    cudaGridDependencySynchronize();  // `prepare` has left zeros in dQ's sums
    sum_peer_keys(args, smem, rank);
  }
  __syncwarp();
  ptx::cluster_sync_relaxed();  // until then the peer may send to this thread block
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config, bool kPersistent>
void launch_form(const BackwardArguments<Config>& args, int pairs, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WideSmem<Config, kPersistent>);
  allow_shared_memory<backward_wide_kernel<Config, kPersistent>, kBytes>(current_device());
  launch_overlapped(backward_wide_kernel<Config, kPersistent>, 2 * pairs, kWideThreads, kBytes, stream, args,
                    "launching the wide backward kernel");
}

template <class Config>
void launch_wide(const BackwardParams& params, cudaStream_t stream) {
  const Workspace<Config> workspace(params);
  const BackwardArguments<Config> args = make_arguments(params, workspace);
  if (is_persistent(params.problem, Config::kPlan, workspace.schedule)) {
    launch_form<Config, true>(args, workspace.thread_blocks, stream);
  } else {
    launch_form<Config, false>(args, workspace.schedule.items(), stream);
  }
}

void launch_wide_products(const BackwardParams& params, cudaStream_t stream) {
  with_backward_config(params.problem, [&]<class Config>() {
    if constexpr (Config::kByPairs) {
      if (params.problem.options.softcap == 0) {
        launch_wide<Config>(params, stream);
      } else {
        launch_wide<typename Config::Capped>(params, stream);
      }
    }
  });
}

int wide_shared_memory(int head_dim) {
  int bytes = 0;
  with_limits(head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].backward.by_pairs) bytes = sizeof(WideSmem<BackwardConfig<row, __half>, true>);
  });
  return bytes;
}

}  // namespace flash_attn_ext
