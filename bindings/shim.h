/* The C half of package bindings: batches, and the callbacks that fill them. */
#ifndef ZTGATE_SHIM_H
#define ZTGATE_SHIM_H

#include "core.h"

enum {
	IN_ENTRIES = 128,
	IN_BYTES = 128 * (10024 + 18),
	OUT_DATAGRAMS = 4096,
	OUT_FRAMES = 1024,
	OUT_BYTES = 4 << 20,
	LATE_FRAMES = 64,
	LATE_BYTES = 256 << 10,
};

/* An endpoint of the wire: a in network order, 4 or 16 bytes of it. */
typedef struct {
	int64_t socket; /* -1 = all of the family */
	uint32_t off, len;
	uint16_t port;
	uint8_t v6, ttl;
	uint8_t a[16];
} shim_datagram;

/* A whole Ethernet frame. */
typedef struct {
	uint64_t nwid;
	uint32_t off, len;
} shim_frame;

/* What was seen of datagrams, by cipher suite and kind. */
typedef struct {
	uint64_t tx_bytes[4], rx_bytes[4], tx_fragments, rx_fragments;
	uint64_t full; /* datagrams and frames that found no room */
	uint64_t refused; /* frames the core did not take */
} shim_counts;

/* A batch belongs to one goroutine. It is never freed, since a late thread of the
 * core may still hold its address; it is used again instead. */
typedef struct shim_batch {
	unsigned long owner; /* the thread inside a call, 0 = none */
	int frames_late; /* frames go to the node's late ring */
	uint32_t in_n, in_used;
	uint32_t datagrams, frames, out_used;
	shim_counts counts;
	struct shim_batch *next;
	union { shim_datagram datagram; shim_frame frame; } in[IN_ENTRIES];
	shim_datagram datagram[OUT_DATAGRAMS];
	shim_frame frame[OUT_FRAMES];
	uint8_t in_bytes[IN_BYTES];
	uint8_t out_bytes[OUT_BYTES];
} shim_batch;

/* What threads of the core's own deliver (chapter 05 §8.4). */
typedef struct {
	uint32_t frames, used;
	shim_frame frame[LATE_FRAMES];
	uint8_t bytes[LATE_BYTES];
} shim_late;

typedef struct shim_node shim_node;

shim_batch *shim_batch_get(void);
void shim_batch_put(shim_batch *);

int shim_version_ok(int *major, int *minor, int *revision);
shim_node *shim_new(uintptr_t handle, int64_t now, shim_batch *, int *code);
void shim_delete(shim_node *);

/* Both stop early when there may be no room for what comes out; they return the
 * next item to do. */
uint32_t shim_receive(shim_node *, shim_batch *, int64_t now, uint32_t from);
uint32_t shim_write(shim_node *, shim_batch *, int64_t now, uint64_t nwid, uint32_t from);
int shim_background(shim_node *, shim_batch *, int64_t now, int64_t *deadline);
int shim_join(shim_node *, shim_batch *, uint64_t nwid);
int shim_leave(shim_node *, shim_batch *, uint64_t nwid);
int shim_subscribe(shim_node *, shim_batch *, uint64_t nwid, uint64_t mac, uint32_t adi);
int shim_unsubscribe(shim_node *, uint64_t nwid, uint64_t mac, uint32_t adi);
int shim_orbit(shim_node *, shim_batch *, uint64_t id, uint64_t seed);
int shim_deorbit(shim_node *, shim_batch *, uint64_t id);
void shim_local(shim_node *, const shim_datagram *, uint32_t n);
void shim_status(shim_node *, core_status *);
/* NULL if the library's blocks are too small for our layout. */
core_peers *shim_peers(shim_node *);
void shim_free(shim_node *, void *);
void shim_take_late(shim_node *, shim_late *);
int shim_layout_ok(shim_node *, uint64_t nwid);
void shim_endpoint(const core_addr *, shim_datagram *);

#endif
