// Package interop tests the server and the xapi client against software in OCaml, the
// language of the original service:
//
//   - a client that uses libnbd's bindings, against our server;
//   - a xapi made with XmlRpc-Light, against our client of it;
//   - the original's library, as client and as server, where it is installed;
//   - the original's dialogues, written from the protocol, against our server and our client.
//
// The tests build the programs in the *.ml files with Debian's packages. A subtest is named
// peer/mode/action, and logs the peer's version in a line "peer: …".
package interop
