/* What Plover calls of DPDK, compiled against the installed headers: layouts of DPDK's structures are known here and
 * nowhere else, and its inline functions are inlined here. Every value that crosses into Rust is a scalar, an opaque
 * pointer or one of the structures below, which src/lib.rs repeats. Functions return 0 or a negative errno unless they
 * say otherwise. */

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>

struct plover_dpdk_port {
	uint16_t id;
	/* Largest packet without Ethernet header. */
	uint16_t mtu;
	/* Computes the checksums of TCP and UDP over IPv4 and IPv6. */
	uint8_t sends_checksums;
	/* Takes frames for other addresses than its own. */
	uint8_t hears_guest;
	uint8_t link_up;
	/* Descriptors of the receive queue. */
	uint16_t receive_slots;
};

struct plover_dpdk_received {
	struct rte_mbuf *mbuf;
	/* The first piece, which is all unless `pieces` says otherwise. */
	const uint8_t *data;
	uint32_t bytes;
	uint16_t pieces;
	/* 1: the port has found the checksum right. 2: the data are right, the checksum in them is not. */
	uint16_t checksum;
};

static int error_of(int result)
{
	if (result >= 0)
		return 0;
	return result == -1 && rte_errno != 0 ? -rte_errno : result;
}

int plover_dpdk_init(int argc, char **argv)
{
	return error_of(rte_eal_init(argc, argv));
}

/* The calling thread gets caches of its own in memory pools. */
int plover_dpdk_register_thread(void)
{
	if (rte_lcore_id() != LCORE_ID_ANY)
		return 0;
	return error_of(rte_thread_register());
}

void plover_dpdk_unregister_thread(void)
{
	rte_thread_unregister();
}

/* Attaches the device and tells the number of its port, which has the device's name. */
int plover_dpdk_attach(const char *arguments, const char *name, uint16_t *id)
{
	int result;

	/* A PCI device that was named at the start is there already. */
	if (rte_eth_dev_get_port_by_name(name, id) == 0)
		return 0;
	result = error_of(rte_dev_probe(arguments));
	if (result != 0)
		return result;
	return rte_eth_dev_get_port_by_name(name, id) == 0 ? 0 : -ENODEV;
}

/* The pool is for this port alone. */
struct rte_mempool *plover_dpdk_pool(const char *name, uint16_t id, unsigned int count, uint16_t frame_bytes)
{
	int socket = rte_eth_dev_socket_id(id);

	return rte_pktmbuf_pool_create(name, count, 256, 0, RTE_PKTMBUF_HEADROOM + frame_bytes,
				       socket < 0 ? SOCKET_ID_ANY : socket);
}

void plover_dpdk_free_pool(struct rte_mempool *pool)
{
	rte_mempool_free(pool);
}

int plover_dpdk_last_error(void)
{
	return -rte_errno;
}

uint16_t plover_dpdk_mtu(uint16_t id)
{
	uint16_t mtu = 0;

	return rte_eth_dev_get_mtu(id, &mtu) == 0 ? mtu : 1500;
}

/* Frames for the guest's address must come through: by a filter of the port, or all of them. */
static uint8_t hear_guest(uint16_t id, const uint8_t *mac)
{
	struct rte_ether_addr address;

	if (mac != NULL) {
		memcpy(address.addr_bytes, mac, sizeof(address.addr_bytes));
		if (rte_eth_dev_mac_addr_add(id, &address, 0) == 0 && rte_eth_allmulticast_enable(id) == 0)
			return 1;
	}
	return rte_eth_promiscuous_enable(id) == 0;
}

/* One queue each way. `port->id` is set; the rest is filled in. */
int plover_dpdk_start(struct plover_dpdk_port *port, struct rte_mempool *pool, const uint8_t *mac)
{
	const uint64_t receive = RTE_ETH_RX_OFFLOAD_TCP_CKSUM | RTE_ETH_RX_OFFLOAD_UDP_CKSUM;
	const uint64_t send = RTE_ETH_TX_OFFLOAD_TCP_CKSUM | RTE_ETH_TX_OFFLOAD_UDP_CKSUM;
	struct rte_eth_conf configuration;
	struct rte_eth_dev_info info;
	struct rte_eth_link link;
	uint16_t receive_slots = 1024, send_slots = 1024, id = port->id;
	int socket = rte_eth_dev_socket_id(id), result;

	memset(&configuration, 0, sizeof(configuration));
	result = rte_eth_dev_info_get(id, &info);
	if (result != 0)
		return result;
	if ((info.rx_offload_capa & receive) == receive)
		configuration.rxmode.offloads |= receive;
	port->sends_checksums = (info.tx_offload_capa & send) == send;
	if (port->sends_checksums)
		configuration.txmode.offloads |= send;
	result = rte_eth_dev_configure(id, 1, 1, &configuration);
	if (result == 0)
		result = rte_eth_dev_adjust_nb_rx_tx_desc(id, &receive_slots, &send_slots);
	if (result == 0)
		result = rte_eth_rx_queue_setup(id, 0, receive_slots, socket < 0 ? SOCKET_ID_ANY : socket, NULL, pool);
	if (result == 0)
		result = rte_eth_tx_queue_setup(id, 0, send_slots, socket < 0 ? SOCKET_ID_ANY : socket, NULL);
	if (result == 0)
		result = rte_eth_dev_start(id);
	if (result != 0)
		return result;
	port->receive_slots = receive_slots;
	port->mtu = plover_dpdk_mtu(id);
	port->hears_guest = hear_guest(id, mac);
	memset(&link, 0, sizeof(link));
	port->link_up = rte_eth_link_get_nowait(id, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
	return 0;
}

/* 1: up. 0: down, or not known. */
int plover_dpdk_link_up(uint16_t id)
{
	struct rte_eth_link link;

	memset(&link, 0, sizeof(link));
	return rte_eth_link_get_nowait(id, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}

/* Stops the port and takes its device away. */
void plover_dpdk_detach(uint16_t id)
{
	struct rte_eth_dev_info info;
	int known = rte_eth_dev_info_get(id, &info) == 0;

	rte_eth_dev_stop(id);
	rte_eth_dev_close(id);
	if (known && info.device != NULL)
		rte_dev_remove(info.device);
}

/* Whether the device is gone: pulled out. */
int plover_dpdk_is_removed(uint16_t id)
{
	return !rte_eth_dev_is_valid_port(id) || rte_eth_dev_is_removed(id);
}

/* Frames that the port had no room for, since it was started. */
uint64_t plover_dpdk_missed(uint16_t id)
{
	struct rte_eth_stats stats;

	if (rte_eth_stats_get(id, &stats) != 0)
		return 0;
	return stats.imissed + stats.rx_nombuf;
}

/* Takes up to `count` frames; returns how many. Each must be freed. */
uint16_t plover_dpdk_receive(uint16_t id, struct plover_dpdk_received *into, uint16_t count)
{
	struct rte_mbuf *mbufs[64];
	uint16_t got = rte_eth_rx_burst(id, 0, mbufs, RTE_MIN(count, 64));

	for (uint16_t i = 0; i < got; i++) {
		struct rte_mbuf *mbuf = mbufs[i];
		uint64_t checksum = mbuf->ol_flags & RTE_MBUF_F_RX_L4_CKSUM_MASK;

		into[i].mbuf = mbuf;
		into[i].data = rte_pktmbuf_mtod(mbuf, const uint8_t *);
		into[i].bytes = rte_pktmbuf_pkt_len(mbuf);
		into[i].pieces = mbuf->nb_segs;
		into[i].checksum = checksum == RTE_MBUF_F_RX_L4_CKSUM_GOOD ? 1
				 : checksum == RTE_MBUF_F_RX_L4_CKSUM_NONE ? 2 : 0;
	}
	return got;
}

/* Copies a frame of several pieces; `into` has room for all of its bytes. */
void plover_dpdk_copy(const struct rte_mbuf *mbuf, uint8_t *into)
{
	for (; mbuf != NULL; mbuf = mbuf->next) {
		memcpy(into, rte_pktmbuf_mtod(mbuf, const uint8_t *), rte_pktmbuf_data_len(mbuf));
		into += rte_pktmbuf_data_len(mbuf);
	}
}

void plover_dpdk_free_received(struct plover_dpdk_received *received, uint16_t count)
{
	for (uint16_t i = 0; i < count; i++)
		rte_pktmbuf_free(received[i].mbuf);
}

/* A frame to be filled in: `bytes` at *data, of which the first `skip` are not sent. NULL: the pool is empty. */
struct rte_mbuf *plover_dpdk_prepare(struct rte_mempool *pool, uint16_t bytes, uint16_t skip, uint8_t **data)
{
	struct rte_mbuf *mbuf = rte_pktmbuf_alloc(pool);

	if (mbuf == NULL)
		return NULL;
	*data = (uint8_t *)rte_pktmbuf_append(mbuf, bytes);
	if (*data == NULL || rte_pktmbuf_adj(mbuf, skip) == NULL) {
		rte_pktmbuf_free(mbuf);
		return NULL;
	}
	return mbuf;
}

/* The port is to compute the checksum of TCP or UDP; the sum over the pseudo header is in place. */
void plover_dpdk_request_checksum(struct rte_mbuf *mbuf, uint16_t l2_bytes, uint16_t l3_bytes, int is_v6, int is_tcp)
{
	mbuf->l2_len = l2_bytes;
	mbuf->l3_len = l3_bytes;
	mbuf->ol_flags |= (is_v6 ? RTE_MBUF_F_TX_IPV6 : RTE_MBUF_F_TX_IPV4) |
			  (is_tcp ? RTE_MBUF_F_TX_TCP_CKSUM : RTE_MBUF_F_TX_UDP_CKSUM);
}

/* Sends the frames, all of which are gone afterwards. Returns how many left; *refused could not be prepared. */
uint16_t plover_dpdk_send(uint16_t id, struct rte_mbuf **mbufs, uint16_t count, uint16_t *refused)
{
	uint16_t done = 0, sent = 0;

	*refused = 0;
	while (done < count) {
		uint16_t ready = rte_eth_tx_prepare(id, 0, mbufs + done, count - done);
		uint16_t taken = rte_eth_tx_burst(id, 0, mbufs + done, ready);

		sent += taken;
		for (uint16_t i = taken; i < ready; i++)
			rte_pktmbuf_free(mbufs[done + i]);
		done += ready;
		if (done < count) {
			rte_pktmbuf_free(mbufs[done]);
			done++;
			(*refused)++;
		}
	}
	return sent;
}

/* Gives frames back that were prepared and not sent. */
void plover_dpdk_free(struct rte_mbuf **mbufs, uint16_t count)
{
	for (uint16_t i = 0; i < count; i++)
		rte_pktmbuf_free(mbufs[i]);
}
