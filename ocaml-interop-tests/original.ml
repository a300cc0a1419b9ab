(* Client and server made of the library of the original service.

   original list PORT
   original copy PORT NAME FILE
   original serve NAME FILE      ends with its standard input *)

open Lwt.Infix

let host = "127.0.0.1"

let list port =
  Nbd_unix.connect host port >>= Nbd_unix.Client.list >|= function
  | Ok names -> List.iteri (fun i name -> Printf.printf "export %d: %s\n" (i + 1) name) names
  | Error `Policy -> print_endline "listed: policy"
  | Error `Unsupported -> print_endline "listed: unsupported"

let piece = 65536

let copy port name file =
  Nbd_unix.connect host port >>= fun channel ->
  Nbd_unix.Client.negotiate channel name >>= fun (disk, size, flags) ->
  let read_only = List.mem Nbd.Protocol.PerExportFlag.Read_only flags in
  Printf.printf "size: %Ld\nread-only: %b\n" size read_only;
  let out = open_out_bin file in
  let rec from offset =
    let length = min piece (Int64.to_int size - offset) in
    if length = 0 then Lwt.return (close_out out)
    else
      let buf = Cstruct.create length in
      Nbd_unix.Client.read disk (Int64.of_int offset) [ buf ] >>= function
      | Error e -> Lwt.fail_with (Format.asprintf "%a" Nbd_unix.Client.pp_error e)
      | Ok () ->
          output_string out (Cstruct.to_string buf);
          from (offset + length)
  in
  from 0

let connection name file fd =
  Nbd_unix.with_channel fd None (fun channel ->
      Nbd_unix.Server.with_connection channel ~offer:[ name ] (fun asked t ->
          if asked <> name then Lwt.fail_with "no such export"
          else Nbd_unix.with_block file (Nbd_unix.Server.serve t ~read_only:true (module Block))))

let serve name file =
  let socket = Lwt_unix.socket Unix.PF_INET Unix.SOCK_STREAM 0 in
  Lwt_unix.bind socket (Unix.ADDR_INET (Unix.inet_addr_loopback, 0)) >>= fun () ->
  Lwt_unix.listen socket 5;
  (match Lwt_unix.getsockname socket with
  | Unix.ADDR_INET (_, port) -> Printf.printf "port %d\nready\n%!" port
  | Unix.ADDR_UNIX _ -> assert false);
  let rec accept () =
    Lwt_unix.accept socket >>= fun (fd, _) ->
    (* A session that ends with an error is no matter of this program. *)
    Lwt.async (fun () -> Lwt.catch (fun () -> connection name file fd) (fun _ -> Lwt.return_unit));
    accept ()
  in
  Lwt.pick [ accept (); Lwt_io.read Lwt_io.stdin >|= ignore ]

let () =
  let run =
    match List.tl (Array.to_list Sys.argv) with
    | [ "list"; port ] -> list (int_of_string port)
    | [ "copy"; port; name; file ] -> copy (int_of_string port) name file
    | [ "serve"; name; file ] -> serve name file
    | _ -> Lwt.fail_with "no such command"
  in
  try Lwt_main.run run
  with e ->
    Printf.printf "error: %s\n" (Printexc.to_string e);
    exit 1
