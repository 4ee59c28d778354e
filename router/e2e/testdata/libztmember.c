/*
 * A member on libzt, for TestInteropEvery. It joins a network and echoes TCP on some
 * ports. A line on standard input asks for a connection to an echo server, and the
 * number is printed once something came back; or it joins one more network:
 *
 *     connect ADDRESS PORT NUMBER
 *     join NETWORK
 *
 * Usage: libztmember HOME PLANET NETWORK PORT...
 */
#include <ZeroTierSockets.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char own[ZTS_IP_MAX_STR_LEN];

static void *echo(void *arg)
{
	int fd = (int)(intptr_t)arg;
	char b[1400];
	ssize_t n;
	while ((n = zts_read(fd, b, sizeof b)) > 0 && zts_write(fd, b, n) == n)
		;
	zts_close(fd);
	return NULL;
}

static void *serve(void *arg)
{
	unsigned short port = (intptr_t)arg;
	int l = zts_socket(ZTS_AF_INET, ZTS_SOCK_STREAM, 0);
	if (l < 0 || zts_bind(l, own, port) < 0 || zts_listen(l, 16) < 0) {
		fprintf(stderr, "can't listen on %s port %d\n", own, port);
		exit(1);
	}
	for (;;) {
		char from[ZTS_IP_MAX_STR_LEN];
		unsigned short from_port;
		pthread_t t;
		int fd = zts_accept(l, from, sizeof from, &from_port);
		if (fd >= 0 && pthread_create(&t, NULL, echo, (void *)(intptr_t)fd) == 0)
			pthread_detach(t);
	}
	return NULL;
}

struct order {
	char to[64];
	int port, number;
};

static void *try(void *arg)
{
	struct order *o = arg;
	char b[5] = {0};
	int fd = zts_socket(ZTS_AF_INET, ZTS_SOCK_STREAM, 0);
	if (fd >= 0 && zts_connect(fd, o->to, o->port, 2000) == ZTS_ERR_OK && zts_set_recv_timeout(fd, 2, 0) == ZTS_ERR_OK
		&& zts_write(fd, "hello", 5) == 5 && zts_read(fd, b, 5) == 5 && memcmp(b, "hello", 5) == 0) {
		printf("%d\n", o->number);
		fflush(stdout);
	}
	if (fd >= 0)
		zts_close(fd);
	free(o);
	return NULL;
}

int main(int argc, char **argv)
{
	static char planet[65536];
	char line[256];
	uint64_t network;
	pthread_t t;
	FILE *f;
	size_t len;
	int i;

	if (argc < 5 || !(f = fopen(argv[2], "rb")))
		return 2;
	len = fread(planet, 1, sizeof planet, f);
	fclose(f);
	network = strtoull(argv[3], NULL, 16);
	if (zts_init_from_storage(argv[1]) || zts_init_set_roots(planet, len) || zts_init_allow_port_mapping(0) || zts_node_start())
		return 1;
	while (!zts_node_is_online())
		zts_util_delay(50);
	printf("address %010" PRIx64 "\n", (uint64_t)zts_node_get_id());
	fflush(stdout);
	zts_net_join(network);
	while (!zts_net_transport_is_ready(network) || zts_addr_get_str(network, ZTS_AF_INET, own, sizeof own))
		zts_util_delay(50);
	printf("joined %s\n", own);
	fflush(stdout);
	for (i = 4; i < argc; i++)
		pthread_create(&t, NULL, serve, (void *)(intptr_t)atoi(argv[i]));
	while (fgets(line, sizeof line, stdin)) {
		struct order *o;
		if (sscanf(line, "join %" SCNx64, &network) == 1) {
			zts_net_join(network);
			continue;
		}
		o = malloc(sizeof *o);
		if (o && sscanf(line, "connect %63s %d %d", o->to, &o->port, &o->number) == 3 && pthread_create(&t, NULL, try, o) == 0)
			pthread_detach(t); /* a connection that fails takes long */
	}
	return 0;
}
