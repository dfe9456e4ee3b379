/* What Plover calls of SPDK, compiled against the installed headers: layouts of SPDK's structures are known here and
 * nowhere else. Every value that crosses into Rust is a scalar, an opaque pointer or one of the structures below,
 * which src/lib.rs repeats. Nothing here waits: whoever polls has the clock. */

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <spdk/env.h>
#include <spdk/log.h>
#include <spdk/nvme.h>
#include <spdk/version.h>

struct plover_spdk_env {
	const char *core_mask;
	/* May be NULL: SPDK decides. */
	const char *iova_mode;
	/* May be NULL: hugepages without a mount. */
	const char *huge_dir;
	/* More words for DPDK's command line. */
	const char *eal_arguments;
	/* Reserved at the start, MiB; negative: as much as is asked for later. */
	int64_t memory_mib;
};

struct plover_spdk_namespace {
	struct spdk_nvme_ns *ns;
	uint64_t sector_bytes;
	uint64_t sector_count;
	uint64_t metadata_bytes;
	uint64_t max_transfer_bytes;
	/* A volatile write cache, which a flush empties. */
	uint64_t has_write_cache;
};

/* A controller that is being attached. */
struct plover_spdk_attach {
	/* First: SPDK's callback gets a pointer to the options. */
	struct spdk_nvme_ctrlr_opts opts;
	struct spdk_nvme_probe_ctx *probe;
	struct spdk_nvme_ctrlr *ctrlr;
};

typedef void (*plover_spdk_log_fn)(int level, const char *message);

static plover_spdk_log_fn g_log;

static void on_log(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
	char message[512];
	vsnprintf(message, sizeof(message), format, args);
	g_log(level, message);
}

const char *plover_spdk_version(void)
{
	return SPDK_VERSION_STRING;
}

int plover_spdk_env_start(const struct plover_spdk_env *env, plover_spdk_log_fn log)
{
	struct spdk_env_opts opts;
	memset(&opts, 0, sizeof(opts));
	opts.opts_size = sizeof(opts);
	spdk_env_opts_init(&opts);
	g_log = log;
	spdk_log_open(on_log);
	opts.name = "plover";
	opts.core_mask = env->core_mask;
	opts.iova_mode = env->iova_mode;
	opts.hugedir = env->huge_dir;
	/* Without a mount the pages are anonymous. DPDK then refuses --huge-unlink, which SPDK passes unless the
	 * pages of a segment share a file. */
	opts.hugepage_single_segments = env->huge_dir == NULL;
	opts.mem_size = (int)env->memory_mib;
	opts.env_context = (void *)env->eal_arguments;
	/* -1: no other process shares the memory or the devices. */
	opts.shm_id = -1;
	return spdk_env_init(&opts);
}

void *plover_spdk_dma_alloc(uint64_t bytes, uint64_t alignment)
{
	return spdk_dma_zmalloc(bytes, alignment, NULL);
}

void plover_spdk_dma_free(void *memory)
{
	spdk_dma_free(memory);
}

static void on_attach(void *context, const struct spdk_nvme_transport_id *trid, struct spdk_nvme_ctrlr *ctrlr,
		      const struct spdk_nvme_ctrlr_opts *opts)
{
	((struct plover_spdk_attach *)context)->ctrlr = ctrlr;
}

struct plover_spdk_attach *plover_spdk_attach_begin(const char *pci_address, uint32_t admin_timeout_ms)
{
	struct spdk_nvme_transport_id trid;
	memset(&trid, 0, sizeof(trid));
	spdk_nvme_trid_populate_transport(&trid, SPDK_NVME_TRANSPORT_PCIE);
	snprintf(trid.traddr, sizeof(trid.traddr), "%s", pci_address);
	struct plover_spdk_attach *attach = calloc(1, sizeof(*attach));
	if (attach == NULL) {
		return NULL;
	}
	spdk_nvme_ctrlr_get_default_ctrlr_opts(&attach->opts, sizeof(attach->opts));
	attach->opts.admin_timeout_ms = admin_timeout_ms;
	/* The caller says it once and better; SPDK says it three times for each command of a reset. */
	attach->opts.disable_error_logging = true;
	attach->probe = spdk_nvme_connect_async(&trid, &attach->opts, on_attach);
	if (attach->probe == NULL) {
		free(attach);
		return NULL;
	}
	return attach;
}

/* -EAGAIN: again. Else `attach` is gone; 0 and a controller, or -ENODEV. */
int plover_spdk_attach_poll(struct plover_spdk_attach *attach, struct spdk_nvme_ctrlr **ctrlr)
{
	int rc = spdk_nvme_probe_poll_async(attach->probe);
	if (rc == -EAGAIN) {
		return rc;
	}
	*ctrlr = attach->ctrlr;
	free(attach);
	return *ctrlr == NULL ? -ENODEV : 0;
}

/* 0, or -ENODEV when there is no such namespace. */
int plover_spdk_namespace(struct spdk_nvme_ctrlr *ctrlr, uint32_t id, struct plover_spdk_namespace *out)
{
	struct spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(ctrlr, id);
	if (ns == NULL || !spdk_nvme_ns_is_active(ns)) {
		return -ENODEV;
	}
	out->ns = ns;
	out->sector_bytes = spdk_nvme_ns_get_sector_size(ns);
	out->sector_count = spdk_nvme_ns_get_num_sectors(ns);
	out->metadata_bytes = spdk_nvme_ns_get_md_size(ns);
	out->max_transfer_bytes = spdk_nvme_ns_get_max_io_xfer_size(ns);
	out->has_write_cache = spdk_nvme_ctrlr_get_data(ctrlr)->vwc.present;
	return 0;
}

void plover_spdk_set_timeouts(struct spdk_nvme_ctrlr *ctrlr, uint64_t io_us, uint64_t admin_us,
			      spdk_nvme_timeout_cb callback, void *context)
{
	spdk_nvme_ctrlr_register_timeout_callback(ctrlr, io_us, admin_us, callback, context);
}

struct spdk_nvme_qpair *plover_spdk_qpair_create(struct spdk_nvme_ctrlr *ctrlr, uint32_t depth, uint32_t requests)
{
	struct spdk_nvme_io_qpair_opts opts;
	spdk_nvme_ctrlr_get_default_io_qpair_opts(ctrlr, &opts, sizeof(opts));
	/* The default is what the controller can take; what exceeds it waits in the driver. */
	if (depth < opts.io_queue_size) {
		opts.io_queue_size = depth;
	}
	opts.io_queue_requests = requests;
	return spdk_nvme_ctrlr_alloc_io_qpair(ctrlr, &opts, sizeof(opts));
}

int plover_spdk_qpair_free(struct spdk_nvme_qpair *qpair)
{
	return spdk_nvme_ctrlr_free_io_qpair(qpair);
}

int plover_spdk_write(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, const void *memory, uint64_t sector,
		      uint32_t sectors, spdk_nvme_cmd_cb done, void *io)
{
	return spdk_nvme_ns_cmd_write(ns, qpair, (void *)memory, sector, sectors, done, io, 0);
}

int plover_spdk_read(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, void *memory, uint64_t sector,
		     uint32_t sectors, spdk_nvme_cmd_cb done, void *io)
{
	return spdk_nvme_ns_cmd_read(ns, qpair, memory, sector, sectors, done, io, 0);
}

int plover_spdk_flush(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, spdk_nvme_cmd_cb done, void *io)
{
	return spdk_nvme_ns_cmd_flush(ns, qpair, done, io);
}

/* Status code type in the upper byte, status code in the lower; 0 is success. */
uint16_t plover_spdk_status(const struct spdk_nvme_cpl *completion)
{
	return (uint16_t)(completion->status.sct << 8 | completion->status.sc);
}

int32_t plover_spdk_poll(struct spdk_nvme_qpair *qpair)
{
	return spdk_nvme_qpair_process_completions(qpair, 0);
}

int32_t plover_spdk_poll_admin(struct spdk_nvme_ctrlr *ctrlr)
{
	return spdk_nvme_ctrlr_process_admin_completions(ctrlr);
}

/* What waits for an admin command inside SPDK then returns with an error. */
void plover_spdk_fail(struct spdk_nvme_ctrlr *ctrlr)
{
	spdk_nvme_ctrlr_fail(ctrlr);
}

bool plover_spdk_is_failed(struct spdk_nvme_ctrlr *ctrlr)
{
	return spdk_nvme_ctrlr_is_failed(ctrlr);
}

/* A reset in the steps of spdk_nvme_ctrlr_reset: disconnect, poll the admin queue until -ENXIO, reconnect_begin, and
 * reconnect_poll until it is not -EAGAIN. */
int plover_spdk_disconnect(struct spdk_nvme_ctrlr *ctrlr)
{
	return spdk_nvme_ctrlr_disconnect(ctrlr);
}

void plover_spdk_reconnect_begin(struct spdk_nvme_ctrlr *ctrlr)
{
	spdk_nvme_ctrlr_reconnect_async(ctrlr);
}

int plover_spdk_reconnect_poll(struct spdk_nvme_ctrlr *ctrlr)
{
	return spdk_nvme_ctrlr_reconnect_poll_async(ctrlr);
}

int plover_spdk_detach_begin(struct spdk_nvme_ctrlr *ctrlr, struct spdk_nvme_detach_ctx **detach)
{
	*detach = NULL;
	return spdk_nvme_detach_async(ctrlr, detach);
}

/* -EAGAIN: again; else `detach` is gone. */
int plover_spdk_detach_poll(struct spdk_nvme_detach_ctx *detach)
{
	return spdk_nvme_detach_poll_async(detach);
}
