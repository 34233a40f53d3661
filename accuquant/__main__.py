from accuquant.cli.main import main

main()
