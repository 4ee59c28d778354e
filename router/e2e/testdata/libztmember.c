/*
 * A member on libzt, for TestInteropLibzt. It joins a network and echoes TCP on a
 * port. Lines on standard input are commands with one line of answer each:
 *
 *     connect ADDRESS PORT    "ok" if a line comes back from an echo server
 *
 * Usage: libztmember HOME PLANET NETWORK PORT
 */
#include <ZeroTierSockets.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned short port;
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

static void *serve(void *unused)
{
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
	return unused;
}

static int try(const char *to, unsigned short to_port)
{
	char b[5] = {0};
	int fd = zts_socket(ZTS_AF_INET, ZTS_SOCK_STREAM, 0);
	int ok = fd >= 0 && zts_connect(fd, to, to_port, 2000) == ZTS_ERR_OK && zts_set_recv_timeout(fd, 2, 0) == ZTS_ERR_OK
		&& zts_write(fd, "hello", 5) == 5 && zts_read(fd, b, 5) == 5 && memcmp(b, "hello", 5) == 0;
	if (fd >= 0)
		zts_close(fd);
	return ok;
}

int main(int argc, char **argv)
{
	static char planet[65536];
	char line[256], to[64];
	int to_port;
	uint64_t network;
	pthread_t t;
	FILE *f;
	size_t len;

	if (argc != 5 || !(f = fopen(argv[2], "rb")))
		return 2;
	len = fread(planet, 1, sizeof planet, f);
	fclose(f);
	network = strtoull(argv[3], NULL, 16);
	port = atoi(argv[4]);
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
	pthread_create(&t, NULL, serve, NULL);
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "connect %63s %d", to, &to_port) == 2)
			puts(try(to, to_port) ? "ok" : "failed");
		fflush(stdout);
	}
	return 0;
}
