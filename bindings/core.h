/* What we use of the core's C interface (chapter 05 §3, §5 and §7): an installed
 * libzt has no header for it. Sizes are checked here when this is compiled, and
 * the library's version when a node starts. */
#ifndef ZTGATE_CORE_H
#define ZTGATE_CORE_H

#include <stdint.h>
#include <sys/socket.h>

#define CORE_MAJOR 1
#define CORE_MINOR 12

typedef struct ZT_Node core_node;
typedef struct sockaddr_storage core_addr;

typedef struct {
	core_addr target, via; /* family 0 = no via; port of target = prefix length */
	uint16_t flags, metric;
} core_route;

typedef struct {
	uint64_t nwid, mac;
	char name[128];
	int status, type;
	unsigned int mtu;
	int dhcp, bridge, broadcast, port_error;
	unsigned long revision;
	unsigned int address_count;
	core_addr address[32];
	unsigned int route_count;
	core_route route[128];
	unsigned int group_count;
	struct { uint64_t mac; uint32_t adi; } group[1024];
	struct { char domain[128]; core_addr server[4]; } dns;
	uint8_t sso;
	uint64_t sso_version;
	char auth_url[2048];
	uint64_t auth_expiry;
	char issuer_url[2048], central_url[2048], nonce[128], state[256], client[256], provider[64];
} core_config;

typedef struct {
	core_addr address;
	uint64_t last_send, last_receive, trusted;
	float latency_mean, latency_max, latency_variance, loss, errors;
	uint16_t flows;
	uint8_t scope;
	float quality;
	char ifname[256];
	uint64_t socket;
	int expired;
	uint8_t bonded, eligible;
	uint32_t speed;
	int preferred;
} core_path;

typedef struct {
	uint64_t address;
	int major, minor, revision; /* -1 = unknown */
	int latency; /* ms, -1 = unknown */
	int role; /* 0 leaf, 1 moon, 2 planet */
	int is_bonded, policy, links_alive, links;
	char bond[32];
	unsigned int path_count;
	core_path path[64];
} core_peer;

typedef struct { core_peer *peers; unsigned long count; } core_peers;

typedef struct {
	uint64_t address;
	const char *public_identity, *secret_identity;
	int online;
} core_status;

typedef struct {
	long version;
	void (*state_put)(core_node *, void *, void *, int, const uint64_t[2], const void *, int);
	int (*state_get)(core_node *, void *, void *, int, const uint64_t[2], void *, unsigned int);
	int (*wire_send)(core_node *, void *, void *, int64_t, const core_addr *, const void *, unsigned int, unsigned int);
	void (*frame)(core_node *, void *, void *, uint64_t, void **, uint64_t, uint64_t, unsigned int, unsigned int, const void *, unsigned int);
	int (*config)(core_node *, void *, void *, uint64_t, void **, int, const core_config *);
	void (*event)(core_node *, void *, void *, int, const void *);
	int (*path_check)(core_node *, void *, void *, uint64_t, int64_t, const core_addr *);
	int (*path_lookup)(core_node *, void *, void *, uint64_t, int, core_addr *);
} core_callbacks;

_Static_assert(sizeof(core_config) == 61992, "layout of the network configuration");
_Static_assert(sizeof(core_peer) == 29776, "layout of a peer");
_Static_assert(sizeof(core_path) == 464, "layout of a path");
_Static_assert(sizeof(core_route) == 264, "layout of a route");
_Static_assert(sizeof(core_status) == 32, "layout of the node's status");
_Static_assert(sizeof(core_callbacks) == 72, "layout of the callbacks");

int ZT_Node_new(core_node **, void *, void *, const core_callbacks *, int64_t);
void ZT_Node_delete(core_node *);
int ZT_Node_processWirePacket(core_node *, void *, int64_t, int64_t, const core_addr *, const void *, unsigned int, volatile int64_t *);
int ZT_Node_processVirtualNetworkFrame(core_node *, void *, int64_t, uint64_t, uint64_t, uint64_t, unsigned int, unsigned int, const void *, unsigned int, volatile int64_t *);
int ZT_Node_processBackgroundTasks(core_node *, void *, int64_t, volatile int64_t *);
int ZT_Node_join(core_node *, uint64_t, void *, void *);
int ZT_Node_leave(core_node *, uint64_t, void **, void *);
int ZT_Node_multicastSubscribe(core_node *, void *, uint64_t, uint64_t, unsigned long);
int ZT_Node_multicastUnsubscribe(core_node *, uint64_t, uint64_t, unsigned long);
int ZT_Node_orbit(core_node *, void *, uint64_t, uint64_t);
int ZT_Node_deorbit(core_node *, void *, uint64_t);
uint64_t ZT_Node_address(core_node *);
void ZT_Node_status(core_node *, core_status *);
core_peers *ZT_Node_peers(core_node *);
core_config *ZT_Node_networkConfig(core_node *, uint64_t);
void ZT_Node_freeQueryResult(core_node *, void *);
int ZT_Node_addLocalInterfaceAddress(core_node *, const core_addr *);
void ZT_Node_clearLocalInterfaceAddresses(core_node *);
void ZT_version(int *, int *, int *);

#endif
