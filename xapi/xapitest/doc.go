// Package xapitest simulates the part of a XenServer host that the NBD export service uses:
// xapi's XML-RPC service on its unix socket, its VBD, VDI, VM, host, pool, network and
// session objects, and the devices that VBD.plug makes. It is for the tests of this module
// and the demo.
//
// It shares no code with the client it tests: its own HTTP loop and its own
// codec write the bytes that xapi writes (untyped strings and integers, the
// Status envelope, header order and case, dropped control characters) and
// refuse what xapi refuses (no Content-Length, headers over 1024 bytes, bodies
// over 300 KiB, wrong types, missing VBD.create members, calls beyond the
// session's role).
//
// # Devices
//
// In Config.Dir a Host has the socket "xapi", the inventory "xensource-inventory", "images/"
// and "dev/", and under StyleNBD the directories SysDir and NBDDir. VBD.plug makes a symlink
// in dev/, named by Config.Style, to the image file or, with Config.Loop, to a loop device,
// which needs root.
//
// With Config.Maker the caller makes the devices, such as Xen's block devices.
//
// VBD.unplug and VBD.unplug_force are refused while any process holds the
// device open; the holder is found by comparing every descriptor in /proc with
// the device. The refusal is that of SM for a device in use:
// SR_BACKEND_FAILURE_46 with "opterr=device is in use (opened by pid N)".
// DEVICE_DETACH_REJECTED does not occur: it belongs to the
// frontend of a guest, which VBDs of the control domain do not have. Without root only
// descriptors of the same user are seen. Memory mappings are not seen.
//
// Under StyleNBD, where xapi's helper program calls nbd-client, unplug is not
// refused. It disconnects the device first, which removes the symlink and the
// files under SysDir and NBDDir, and then waits for the openers to go, for up to
// Config.NBDUnplugWait. After that it fails with the helper's INTERNAL_ERROR, the
// VBD stays attached, and the next unplug waits again. The name is free for
// another VBD once the unplug has succeeded. With [Host.Rebind] the device
// gets the data of another VDI while it is open.
//
// As in the storage layer of xapi, several VBDs may share a VDI, and the data
// path is taken down by the last of them. In file mode they share the image,
// so only the unplug of the last attached VBD of a VDI is refused. With Loop
// every VBD has its own device, save under StyleSM, whose names are per VDI.
//
// # Other clients
//
// Host has methods for the calls of other clients, such as [Host.UnplugVBD] and
// [Host.DataDestroy], which act like the calls on the socket, and [Host.ResizeVDI], which
// resizes a VDI, its device or both. OnCall is not called for them, and of the faults only
// BlockWork applies.
//
// [Host.AddVM] adds a guest VM, which can be started and shut down; its VBDs are no devices
// of this host.
//
// # Broken connections and restarts
//
// A call that reached the host continues when its connection breaks: a VBD.plug still ends
// with an attached VBD. [Host.Restart] ends all sessions and connections; mutating calls on
// VBDs and VDIs continue, because xapi does not undo storage work. With [Host.OnCall] a test
// can interrupt any call at any point.
//
// # Storage
//
// A VDI with VDISpec.VHD has, beside the file with its content, a VHD image under
// "sr-mount/<SR uuid>/", and, once it was snapshotted, a chain of them, see
// [Host.Chain]. [Host.WriteVDI] writes to both. [Host.SnapshotVDI],
// [Host.CollectGarbage] and [Host.DestroyVDI] change the chain in the steps of SM, and
// VDI records follow: vhd-parent, is_a_snapshot, snapshot_of, and a record for each
// base copy. While a VBD is attached, "sm/phy/<SR uuid>/<VDI uuid>" in the device
// directory leads to the image, and sm_config has "host_<ref of the host>" with the mode.
//
// Such a VDI can have changed block tracking, see [Host.EnableCBT]. The bitmaps of
// VDI.list_changed_blocks come from the writes between two snapshots, and the call waits
// and fails as xapi's does. [Host.AnswerChangedBlocks] gives other answers.
//
// # Not simulated
//
// JSON-RPC, Async calls, tasks and event.from; other hosts and pool supporters; states of VMs
// besides Halted and Running; LVM, and snapshots of raw VDIs;
// session expiry by time and the limit of 500 sessions per originator. A device
// that unplug has disconnected under StyleNBD gives its openers data instead of
// errors.
package xapitest
