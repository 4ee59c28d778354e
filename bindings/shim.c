//go:build libzt

#include "shim.h"

#include <malloc.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "_cgo_export.h"

struct shim_node {
	core_node *node;
	uintptr_t handle;
	volatile int64_t deadline; /* written by the core, not read: background tasks tell theirs */
	pthread_mutex_t mu; /* guards late; nothing else is called with it held */
	shim_late *late; /* NULL once closed */
	time_t ended;
	struct shim_node *next;
};

static pthread_mutex_t pool_mu = PTHREAD_MUTEX_INITIALIZER;
static shim_batch *pool;
static shim_node *ended; /* oldest first */
static shim_node **ended_tail = &ended;

/* A late thread of the core may use a node's context after it was deleted, but
 * not for long. */
enum { GRACE_SECONDS = 10 };

shim_batch *shim_batch_get(void)
{
	pthread_mutex_lock(&pool_mu);
	shim_batch *b = pool;
	if (b) pool = b->next;
	pthread_mutex_unlock(&pool_mu);
	if (!b) return calloc(1, sizeof *b);
	b->in_n = b->in_used = b->datagrams = b->frames = b->out_used = 0;
	memset(&b->counts, 0, sizeof b->counts);
	return b;
}

void shim_batch_put(shim_batch *b)
{
	pthread_mutex_lock(&pool_mu);
	b->next = pool;
	pool = b;
	pthread_mutex_unlock(&pool_mu);
}

static void begin(shim_batch *b) { __atomic_store_n(&b->owner, (unsigned long)pthread_self(), __ATOMIC_RELAXED); }
static void end(shim_batch *b) { __atomic_store_n(&b->owner, 0, __ATOMIC_RELAXED); }

/* mine returns the batch if this call came in with it, and not from a thread
 * that the core started with a copy of the pointer. */
static shim_batch *mine(void *tptr)
{
	shim_batch *b = tptr;
	if (b && __atomic_load_n(&b->owner, __ATOMIC_RELAXED) == (unsigned long)pthread_self()) return b;
	return NULL;
}

/* count looks at a packet's header (chapter 01 §4): fragments have 0xff where a
 * packet has the first byte of the sender's address. */
static void count(const uint8_t *p, uint32_t len, uint64_t *bytes, uint64_t *fragments)
{
	if (len > 13 && p[13] == 0xff) {
		++*fragments;
		return;
	}
	if (len > 18) {
		bytes[(p[18] >> 3) & 3] += len;
		if (p[18] & 0x40) ++*fragments;
	}
}

void shim_endpoint(const core_addr *ss, shim_datagram *d)
{
	memset(d->a, 0, sizeof d->a);
	d->v6 = 2; /* neither */
	d->port = 0;
	if (ss->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const struct sockaddr_in *)ss;
		memcpy(d->a, &in->sin_addr, 4);
		d->port = ntohs(in->sin_port);
		d->v6 = 0;
	} else if (ss->ss_family == AF_INET6) {
		const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)ss;
		memcpy(d->a, &in->sin6_addr, 16);
		d->port = ntohs(in->sin6_port);
		d->v6 = 1;
	}
}

static void address(const shim_datagram *d, core_addr *ss)
{
	memset(ss, 0, sizeof *ss);
	if (d->v6) {
		struct sockaddr_in6 *in = (struct sockaddr_in6 *)ss;
		in->sin6_family = AF_INET6;
		in->sin6_port = htons(d->port);
		memcpy(&in->sin6_addr, d->a, 16);
	} else {
		struct sockaddr_in *in = (struct sockaddr_in *)ss;
		in->sin_family = AF_INET;
		in->sin_port = htons(d->port);
		memcpy(&in->sin_addr, d->a, 4);
	}
}

/* Callbacks. */

static void on_state_put(core_node *n, void *u, void *t, int type, const uint64_t id[2], const void *data, int len)
{
	(void)n, (void)t;
	goStatePut(((shim_node *)u)->handle, type, id[0], (void *)data, len);
}

static int on_state_get(core_node *n, void *u, void *t, int type, const uint64_t id[2], void *buf, unsigned int max)
{
	(void)n, (void)t;
	return goStateGet(((shim_node *)u)->handle, type, id[0], buf, max);
}

static int on_send(core_node *n, void *u, void *t, int64_t sock, const core_addr *to, const void *data, unsigned int len, unsigned int ttl)
{
	(void)n, (void)u;
	shim_batch *b = mine(t);
	if (!b) return -1;
	if (b->datagrams == OUT_DATAGRAMS || len > OUT_BYTES - b->out_used) {
		b->counts.full++;
		return -1;
	}
	shim_datagram *d = &b->datagram[b->datagrams];
	shim_endpoint(to, d);
	if (d->v6 > 1) return -1;
	d->socket = sock;
	d->ttl = ttl;
	d->off = b->out_used;
	d->len = len;
	memcpy(b->out_bytes + d->off, data, len);
	b->out_used += len;
	b->datagrams++;
	count(data, len, b->counts.tx_bytes, &b->counts.tx_fragments);
	return 0;
}

static void put_mac(uint8_t *p, uint64_t mac)
{
	for (int i = 5; i >= 0; i--, mac >>= 8) p[i] = mac;
}

static uint64_t get_mac(const uint8_t *p)
{
	uint64_t mac = 0;
	for (int i = 0; i < 6; i++) mac = mac << 8 | p[i];
	return mac;
}

static void put_frame(uint8_t *p, uint64_t src, uint64_t dst, unsigned int type, const void *data, unsigned int len)
{
	put_mac(p, dst);
	put_mac(p + 6, src);
	p[12] = type >> 8;
	p[13] = type;
	memcpy(p + 14, data, len);
}

static void on_frame(core_node *n, void *u, void *t, uint64_t nwid, void **nuptr, uint64_t src, uint64_t dst,
	unsigned int type, unsigned int vlan, const void *data, unsigned int len)
{
	(void)n, (void)nuptr, (void)vlan;
	shim_node *s = u;
	shim_batch *b = mine(t);
	if (b && !b->frames_late) {
		if (b->frames == OUT_FRAMES || len + 14 > OUT_BYTES - b->out_used) {
			b->counts.full++;
			return;
		}
		shim_frame *f = &b->frame[b->frames++];
		f->nwid = nwid;
		f->off = b->out_used;
		f->len = len + 14;
		put_frame(b->out_bytes + f->off, src, dst, type, data, len);
		b->out_used += f->len;
		return;
	}
	pthread_mutex_lock(&s->mu);
	shim_late *l = s->late;
	int room = l && l->frames < LATE_FRAMES && len + 14 <= LATE_BYTES - l->used;
	if (room) {
		shim_frame *f = &l->frame[l->frames++];
		f->nwid = nwid;
		f->off = l->used;
		f->len = len + 14;
		put_frame(l->bytes + f->off, src, dst, type, data, len);
		l->used += f->len;
	}
	uintptr_t handle = s->handle;
	pthread_mutex_unlock(&s->mu);
	goLate(handle, room);
}

static int on_config(core_node *n, void *u, void *t, uint64_t nwid, void **nuptr, int op, const core_config *c)
{
	(void)n, (void)t, (void)nuptr;
	goConfig(((shim_node *)u)->handle, nwid, op, (core_config *)c);
	return 0;
}

static void on_event(core_node *n, void *u, void *t, int event, const void *meta)
{
	(void)n, (void)t, (void)meta;
	goEvent(((shim_node *)u)->handle, event);
}

static int on_path_check(core_node *n, void *u, void *t, uint64_t peer, int64_t sock, const core_addr *to)
{
	(void)n, (void)t, (void)peer, (void)sock;
	shim_datagram d;
	shim_endpoint(to, &d);
	if (d.v6 > 1) return 0;
	return goPathCheck(((shim_node *)u)->handle, &d);
}

/* Calls. */

int shim_version_ok(int *major, int *minor, int *revision)
{
	ZT_version(major, minor, revision);
	return *major == CORE_MAJOR && *minor == CORE_MINOR;
}

static void bury(shim_node *s)
{
	s->ended = time(NULL);
	s->next = NULL;
	pthread_mutex_lock(&pool_mu);
	*ended_tail = s;
	ended_tail = &s->next;
	pthread_mutex_unlock(&pool_mu);
}

static void sweep(void)
{
	time_t now = time(NULL);
	pthread_mutex_lock(&pool_mu);
	while (ended && now - ended->ended > GRACE_SECONDS) {
		shim_node *s = ended;
		ended = s->next;
		if (!ended) ended_tail = &ended;
		pthread_mutex_destroy(&s->mu);
		free(s);
	}
	pthread_mutex_unlock(&pool_mu);
}

shim_node *shim_new(uintptr_t handle, int64_t now, shim_batch *b, int *code)
{
	static const core_callbacks callbacks = {
		.state_put = on_state_put, .state_get = on_state_get, .wire_send = on_send, .frame = on_frame,
		.config = on_config, .event = on_event, .path_check = on_path_check,
	};
	sweep();
	shim_node *s = calloc(1, sizeof *s);
	if (s) s->late = calloc(1, sizeof *s->late);
	if (!s || !s->late) {
		free(s);
		*code = 100;
		return NULL;
	}
	pthread_mutex_init(&s->mu, NULL);
	s->handle = handle;
	begin(b);
	*code = ZT_Node_new(&s->node, s, b, &callbacks, now);
	end(b);
	if (*code) {
		free(s->late);
		s->late = NULL;
		bury(s);
		return NULL;
	}
	return s;
}

void shim_delete(shim_node *s)
{
	ZT_Node_delete(s->node);
	pthread_mutex_lock(&s->mu);
	s->handle = 0;
	free(s->late);
	s->late = NULL;
	pthread_mutex_unlock(&s->mu);
	bury(s);
}

/* One item may lead to many datagrams (a multicast) but hardly to more. */
static int room(const shim_batch *b)
{
	return b->datagrams <= OUT_DATAGRAMS / 2 && b->frames <= OUT_FRAMES / 2 && b->out_used <= OUT_BYTES / 2;
}

uint32_t shim_receive(shim_node *s, shim_batch *b, int64_t now, uint32_t i)
{
	core_addr from;
	begin(b);
	for (; i < b->in_n && room(b); i++) {
		const shim_datagram *d = &b->in[i].datagram;
		const uint8_t *p = b->in_bytes + d->off;
		count(p, d->len, b->counts.rx_bytes, &b->counts.rx_fragments);
		address(d, &from);
		ZT_Node_processWirePacket(s->node, b, now, d->socket, &from, p, d->len, &s->deadline);
	}
	end(b);
	return i;
}

uint32_t shim_write(shim_node *s, shim_batch *b, int64_t now, uint64_t nwid, uint32_t i)
{
	b->frames_late = 1; /* the caller may hold locks that whoever gets frames takes */
	begin(b);
	for (; i < b->in_n && room(b); i++) {
		const shim_frame *f = &b->in[i].frame;
		const uint8_t *p = b->in_bytes + f->off;
		if (ZT_Node_processVirtualNetworkFrame(s->node, b, now, nwid, get_mac(p + 6), get_mac(p), p[12] << 8 | p[13], 0,
			p + 14, f->len - 14, &s->deadline)) b->counts.refused++;
	}
	end(b);
	b->frames_late = 0;
	return i;
}

#define WITH(call) begin(b); int code = call; end(b); return code

int shim_background(shim_node *s, shim_batch *b, int64_t now, int64_t *deadline)
{
	volatile int64_t next = now + 500;
	begin(b);
	int code = ZT_Node_processBackgroundTasks(s->node, b, now, &next);
	end(b);
	*deadline = next;
	return code;
}

int shim_join(shim_node *s, shim_batch *b, uint64_t nwid) { WITH(ZT_Node_join(s->node, nwid, NULL, b)); }
int shim_leave(shim_node *s, shim_batch *b, uint64_t nwid) { WITH(ZT_Node_leave(s->node, nwid, NULL, b)); }
int shim_subscribe(shim_node *s, shim_batch *b, uint64_t nwid, uint64_t mac, uint32_t adi)
{
	WITH(ZT_Node_multicastSubscribe(s->node, b, nwid, mac, adi));
}
int shim_unsubscribe(shim_node *s, uint64_t nwid, uint64_t mac, uint32_t adi)
{
	return ZT_Node_multicastUnsubscribe(s->node, nwid, mac, adi);
}
int shim_orbit(shim_node *s, shim_batch *b, uint64_t id, uint64_t seed) { WITH(ZT_Node_orbit(s->node, b, id, seed)); }
int shim_deorbit(shim_node *s, shim_batch *b, uint64_t id) { WITH(ZT_Node_deorbit(s->node, b, id)); }

void shim_local(shim_node *s, const shim_datagram *d, uint32_t n)
{
	core_addr a;
	ZT_Node_clearLocalInterfaceAddresses(s->node);
	for (uint32_t i = 0; i < n; i++) {
		address(&d[i], &a);
		ZT_Node_addLocalInterfaceAddress(s->node, &a);
	}
}

void shim_status(shim_node *s, core_status *st) { ZT_Node_status(s->node, st); }

core_peers *shim_peers(shim_node *s)
{
	core_peers *l = ZT_Node_peers(s->node);
	if (l && malloc_usable_size(l) < sizeof *l + l->count * sizeof(core_peer)) {
		ZT_Node_freeQueryResult(s->node, l);
		return NULL;
	}
	return l;
}

void shim_free(shim_node *s, void *p) { ZT_Node_freeQueryResult(s->node, p); }

int shim_layout_ok(shim_node *s, uint64_t nwid)
{
	core_config *c = ZT_Node_networkConfig(s->node, nwid);
	if (!c) return 1;
	size_t size = malloc_usable_size(c);
	int ok = size >= sizeof *c && size < sizeof *c + 64 && c->nwid == nwid;
	ZT_Node_freeQueryResult(s->node, c);
	return ok;
}

void shim_take_late(shim_node *s, shim_late *out)
{
	pthread_mutex_lock(&s->mu);
	out->frames = s->late->frames;
	out->used = s->late->used;
	memcpy(out->frame, s->late->frame, sizeof *out->frame * out->frames);
	memcpy(out->bytes, s->late->bytes, out->used);
	s->late->frames = s->late->used = 0;
	pthread_mutex_unlock(&s->mu);
}
