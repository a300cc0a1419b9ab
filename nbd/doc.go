// Package nbd is a server of the Network Block Device protocol: fixed newstyle
// negotiation with TLS, and a transmission phase with many requests in flight. It serves
// any [net.Conn]. The client is package nbd/client.
//
// # A server
//
// A [Server] needs an [Exporter], which opens a [Device] for the name of an export:
//
//	s := &nbd.Server{Exporter: exporter}
//	err := s.Serve(ctx, listener) // until Shutdown
//
// The Exporter is called when a client names an export (NBD_OPT_INFO, NBD_OPT_GO,
// NBD_OPT_EXPORT_NAME, NBD_OPT_SET_META_CONTEXT), and never before. It refuses a client
// with [Refuse], whose text the client receives. An Exporter may also be a [Lister], a
// [ContextExporter], a [Rechecker] or a [PublicNamer].
//
// # Devices
//
// A Device that has only ReadAt, Size and Close is served read-only. For everything else
// there are optional interfaces, which the server looks for once, when it opens the
// export:
//
//   - to be written to: [Writer], and with it [Flusher], [FUAWriter], [WriteThrough],
//     [Trimmer], [ZeroWriter] and [MultiConner]
//   - to describe the export: [BlockSizer], [Describer], [Namer], [Extenter], [Contexter]
//   - to be read faster: [FileBacked], [DataRunner], [Cacher]; or slower: [Pacer]
//   - to end early, and to learn how a connection ended: [Revocable], [ErrorCloser]
//   - to have methods for more than the device can do: [Capable]
//
// The server advertises exactly the capabilities of the device. [ReadOnly] hides that a
// device can be written to. [DeviceOf] makes a Device of a reader, package nbd/nbdfile of a
// file or block device, package nbd/nbdproxy of the export of another server.
//
// # Limits and observation
//
// Peers are not trusted: [Limits] bounds the connections, memory and time that they may
// use. [Server.Conns] and [Server.Totals] return its state, and its Logger gets a
// line for each refusal and for the beginning and the end of each transmission.
//
// # The protocol
//
// All options and commands of the protocol are served except NBD_OPT_PEEK_EXPORT, which it
// has withdrawn, and NBD_CMD_RESIZE, which is not finished. Sections that doc comments name
// are those of the protocol's specification, doc/proto.md. docs/PROTOCOL.md lists what the
// server does for each of them.
//
// # The files
//
// A connection passes through server.go (accept), negotiate.go with one file opt_*.go for
// each option (handshake), session.go (the result of the handshake) and transmission.go
// with one file cmd_*.go for each command (requests). docs/ARCHITECTURE.md follows a
// connection and a request through the files.
package nbd
